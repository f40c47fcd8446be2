"""Holding out: how many, which, and never one question on both sides."""

import random
from collections import Counter

import numpy as np
import pytest

from keras_gemma_ft.data import split
from keras_gemma_ft.data.rows import Conversation, Problem
from keras_gemma_ft.data.split import choose, hold_out
from keras_gemma_ft.errors import UserError


def row(question, answer, number=0, label=None):
    return Conversation(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        f"train.jsonl:{number + 1}",
        label,
    )


@pytest.fixture
def rows():
    """300 rows of three classes, 200, 80 and 20 of them; every question is asked one to four times."""
    answers = ["often"] * 200 + ["at times"] * 80 + ["seldom"] * 20
    rng = random.Random(0)
    made, number = [], 0
    while number < len(answers):
        for spelling in rng.sample(["q {}", "Q  {}", " q {}\n", "q\t{}"], rng.randint(1, 4)):
            if number < len(answers):
                made.append(row(spelling.format(len(made)), answers[number], number))
                number += 1
    return made


@pytest.fixture
def twins():
    """100 rows that ask 50 questions, each twice with other spacing and case."""
    spellings = ("Question {}", "question   {} ")
    return [row(spellings[n % 2].format(n // 2), f"answer {n}", n) for n in range(100)]


def question(conversation):
    return " ".join(conversation.messages[0]["content"].casefold().split())


@pytest.mark.parametrize("fraction", [0.1, 0.15, 0.2])
def test_labels_keep_their_share(rows, fraction):
    train, held_out = hold_out(rows, fraction, seed=3)
    assert len(train) + len(held_out) == 300
    assert [r.origin for r in rows if r in list(train)] == [r.origin for r in train]
    counts = Counter(r.messages[1]["content"] for r in held_out)
    assert counts == {
        "often": round(200 * fraction),
        "at times": round(80 * fraction),
        "seldom": round(20 * fraction),
    }


def test_labels_go_before_answers():
    rows = [row(f"q{n}", f"a{n}", n, label="ab"[n % 10 == 0]) for n in range(100)]
    _, held_out = hold_out(rows, 0.2, seed=0)
    assert Counter(r.label for r in held_out) == {"a": 18, "b": 2}


def test_equal_questions_stay_together(twins):
    train, held_out = hold_out(twins, 0.2, seed=0)
    assert len(held_out) == 20
    assert not {question(r) for r in train} & {question(r) for r in held_out}


def test_the_seed_decides(twins):
    def held(seed):
        return [r.origin for r in hold_out(twins, 0.2, seed)[1]]

    assert held(1) == held(1) != held(2)
    # Must not change: a run that is resumed by a later version holds the same rows out.
    rows = [row(f"q{n}", f"a{n}", n) for n in range(20)]
    assert [r.origin for r in hold_out(rows, 0.1, 0)[1]] == ["train.jsonl:1", "train.jsonl:3"]


def test_a_question_that_most_rows_ask_is_trained_on():
    rows = [row("Hi", f"a{n}", n) for n in range(60)] + [row(f"q{n}", "x", n) for n in range(40)]
    _, held_out = hold_out(rows, 0.1, seed=0)
    assert len(held_out) == 10
    assert "hi" not in {question(r) for r in held_out}
    _, least = hold_out(rows[58:62], 0.1, seed=0)
    assert len(least) == 1


def test_one_question_alone_cannot_be_divided():
    train, _ = hold_out([row("Hi", "a"), row("hi", "b")], 0.1, seed=0)
    with pytest.raises(UserError, match="2 rows ask 1 question") as caught:
        list(train)
    assert "data.eval" in caught.value.remedy


def test_problems_alone_are_an_error():
    problem = Problem("is wrong", "train.jsonl:9", "correct it.")
    train, _ = hold_out([problem] * 3, 0.2, seed=0)
    with pytest.raises(
        UserError, match=r"train\.jsonl:9: no row can be trained on; the first: is wrong\n  correct"
    ):
        list(train)


def test_problems_are_trainings(twins):
    problem = Problem("is wrong", "train.jsonl:9", None)
    train, held_out = hold_out([problem, *twins, problem], 0.2, seed=0)
    assert [r for r in train if isinstance(r, Problem)] == [problem, problem]
    assert len(held_out) == len(list(held_out)) == 20


@pytest.mark.parametrize(("characters", "reads"), [(10_000, 100), (500, 300)])
def test_rows_are_kept_or_read_again(twins, monkeypatch, characters, reads):
    monkeypatch.setattr(split, "_KEPT_CHARACTERS", characters)
    read = 0

    class Rows:
        def __iter__(self):
            nonlocal read
            for each in twins:
                read += 1
                yield each

    train, held_out = hold_out(Rows(), 0.2, seed=0)
    assert read == 0
    parts = [[r.origin for r in part] for part in (train, held_out)]
    assert read == reads
    monkeypatch.undo()
    assert parts == [[r.origin for r in part] for part in hold_out(twins, 0.2, seed=0)]


def test_random_divisions():
    rng = random.Random(0)
    for _ in range(200):
        count = rng.randint(2, 60)
        groups = np.unique([rng.randrange(count) for _ in range(count)], return_inverse=True)[1]
        groups = np.unique(groups, return_inverse=True)[1]
        if groups.max() == 0:
            continue
        strata = np.array([rng.randrange(4) for _ in range(count)])
        fraction = rng.uniform(0.01, 0.5)
        held = choose(groups, strata, fraction, rng.randrange(100))
        assert 0 < held.sum() < count
        for group in range(groups.max() + 1):
            assert len(set(held[groups == group])) == 1
        largest = np.bincount(groups).max()
        assert held.sum() <= max(round(fraction * count), 1) or held.sum() <= largest
