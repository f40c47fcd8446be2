"""Published example numbers are found; numbers that only look like them are not."""

import time

import pytest

from keras_gemma_ft.data.personal import masked, personal


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("email", "jane.doe+cards@mail.example.co.uk"),
        ("email", "a@b.io"),
        ("phone", "+1 212 555 0123"),
        ("phone", "+49 (30) 1234 5678"),
        ("phone", "(212) 555-0123"),
        ("phone", "212.555.0123"),
        ("card", "4242 4242 4242 4242"),
        ("card", "5555555555554444"),
        ("card", "3782 822463 10005"),
        ("IBAN", "DE89 3704 0044 0532 0130 00"),
        ("IBAN", "GB82WEST12345698765432"),
        ("IBAN", "NO93 8601 1117 947"),
        ("SSN", "219-09-9999"),
    ],
)
@pytest.mark.parametrize("around", ["{}", "It is {}.", "({})", "a,{} b", "first line\n{}\nlast"])
def test_what_is_personal_is_found_as_its_kind(kind, match, around):
    assert personal(around.format(match)) == {kind: [match]}


@pytest.mark.parametrize(
    "text",
    [
        "4242 4242 4242 4241",  # wrong check digit
        "DE89 3704 0044 0532 0130 01",
        "666-09-9999",
        "900-12-3456",
        "219-00-9999",
        "<<48+24=72>>72 clips altogether",
        "In 2024 it cost $1,234,567.89, in 2023 3.14159265358979",
        "2024-11-25 13:45:07",
        "see @home or user@localhost",
        "version 10.20.3000.4",
        "ISBN 978-3-16-148410-0",
        "call 911",
        "1234567890123456789012345",
    ],
)
def test_other_numbers_are_not(text):
    assert personal(text) == {}


def test_all_matches_of_a_text_are_listed_by_kind():
    text = "a@b.io wrote to c@d.org about 219-09-9999"
    assert personal(text) == {"email": ["a@b.io", "c@d.org"], "SSN": ["219-09-9999"]}


def test_a_report_does_not_spread_what_it_warns_of():
    assert masked("jane@mail.example") == "ja••••••••le"
    assert masked("a@b.io") == "a••••o"
    assert "4242 4242" not in masked("4242 4242 4242 4242")


@pytest.mark.parametrize("unit", ["x", "1", "1 ", "a.", "A1", "12-", "@", "x@y.", "+1 ", "GB82 "])
def test_time_grows_with_the_text_only(unit):
    def seconds(length: int) -> float:
        start = time.process_time()
        personal(unit * (length // len(unit)))
        return time.process_time() - start

    assert seconds(1_000_000) < 10
