"""How answers are read. The SQuAD cases are worked out by hand from the definition in the official script."""

from decimal import Decimal

import pytest

from keras_gemma_ft.evaluate.metrics import (
    bag_f1,
    exact_match,
    last_number,
    marked_number,
    normalize,
    parse_object,
    slots,
    token_f1,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("U.S.A.", "usa"),
        ("theory", "theory"),  # an article is a whole word
        ("  \n", ""),
        ("the", ""),
    ],
)
def test_normalization_is_squads(text, normalized):
    assert normalize(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "reference", "exact", "f1"),
    [
        ("the Norman dukes", "Norman dukes", True, 1.0),
        ("in the 10th century", "10th century", False, 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("10th and 11th centuries", "in the 10th and 11th centuries", False, 2 * 1 * 0.8 / 1.8),
        ("cat cat dog", "cat dog dog", False, 2 / 3),  # a multiset: one cat and one dog in common
        ("Paris", "London", False, 0.0),
        ("", "", True, 1.0),
        ("the", "", True, 1.0),
        ("", "London", False, 0.0),
    ],
)
def test_exact_match_and_f1_are_squads(prediction, reference, exact, f1):
    assert exact_match(prediction, reference) is exact
    assert token_f1(prediction, reference) == pytest.approx(f1)
    assert token_f1(reference, prediction) == pytest.approx(f1)


def test_bag_f1_is_the_harmonic_mean_of_precision_and_recall():
    precision, recall = 2 / 3, 2 / 4
    assert bag_f1("abc", "abxy") == pytest.approx(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ('{"time": "7pm"}', {"time": "7pm"}),
        ('Sure! Here it is:\n```json\n{"time": "7pm"}\n```\nAnything else?', {"time": "7pm"}),
        ('{not json} but {"people": 2}', {"people": 2}),
        ('{"outer": {"inner": 1}}', {"outer": {"inner": 1}}),
        ('{"time": "7pm"', None),
        ("[1, 2]", None),
        ("", None),
        ("{" * 2000, None),
    ],
)
def test_the_first_object_of_an_answer(answer, value):
    assert parse_object(answer) == value


def test_slots_flatten_objects_and_lists_and_drop_what_is_empty():
    value = {
        "time": " 7  PM",
        "guest": {"names": ["Ada", "Lin"], "note": None},
        "people": 2,
        "vegan": False,
        "x": "",
    }
    assert slots(value) == [
        ("time", "7 pm"),
        ("guest.names", "ada"),
        ("guest.names", "lin"),
        ("people", "2"),
        ("vegan", "false"),
    ]
    assert slots({"time": "7:30"}) != slots({"time": "730"})


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", 18, 18),
        ("#### 1,234", 1234, 1234),
        ("#### $5.50", Decimal("5.50"), Decimal("5.50")),
        ("#### -3", -3, -3),
        ("first #### 1 then #### 2", 2, 2),
        ("It is 42.", None, 42),
        ("It is 42.0", None, 42),
        ("pay $1,000.25 now", None, Decimal("1000.25")),
        ("none at all", None, None),
        ("####", None, None),
    ],
)
def test_the_final_number(text, marked, last):
    assert marked_number(text) == marked
    assert last_number(text) == last
