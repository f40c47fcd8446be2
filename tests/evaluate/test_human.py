"""The blind sheet: nothing in it tells whose answer is whose, and what comes back is scored."""

import json

import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.human import collect, write_sheet


@pytest.fixture
def run(tmp_path):
    rows = [
        {
            "origin": f"test.jsonl:{n}",
            "prompt": [{"role": "user", "content": f"question {n} </script><b>"}],
            "reference": "r",
            "base": {"answer": f"base says {n}" if n else "same"},
            "tuned": {"answer": f"tuned says {n}" if n else "same"},
        }
        for n in range(21)
    ]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def result(run, name, choose):
    """A judge's file; `choose` maps a row number and its order to a choice."""
    key = json.loads((run / "human_key.json").read_text())
    choices = {row: choose(int(row), order) for row, order in key["order"].items()}
    path = run / name
    path.write_text(json.dumps({"sheet": key["sheet"], "choices": {r: c for r, c in choices.items() if c}}))
    return path


def prefers(model):
    return lambda row, order: "A" if order["A"] == model else "B"


def test_the_sheet_is_blind_shuffled_and_whole(run):
    page = write_sheet(run, rows=20, seed=3).read_text()
    order = json.loads((run / "human_key.json").read_text())["order"]
    firsts = [sides["A"] for sides in order.values()]
    assert 4 <= firsts.count("tuned") <= 16
    assert "test.jsonl" not in page
    assert page.count("tuned says") == page.count("base says") == 20  # the fake answers name their model ...
    outside = page.replace("tuned says", "").replace("base says", "")
    assert "tuned" not in outside  # ... and nothing else does
    assert "base" not in outside
    assert "question 1 &lt;/script&gt;&lt;b&gt;" in page
    assert "http" not in page
    assert "same" not in [line for line in page.splitlines() if "answer A" in line]
    for row, sides in order.items():
        block = page.split(f'name="{row}"')[0].rsplit("answer A", 1)[1]
        assert block.index(f"{sides['A']} says") < block.index(f"{sides['B']} says")


def test_the_seed_decides(run):
    orders = []
    for seed in (1, 1, 2):
        write_sheet(run, rows=10, seed=seed)
        orders.append(json.loads((run / "human_key.json").read_text())["order"])
    assert orders[0] == orders[1] != orders[2]
    assert len(orders[0]) == 10


def test_choices_are_mapped_back_and_tested(run):
    write_sheet(run, rows=20)
    ten = lambda row, order: prefers("tuned" if row <= 15 else "base")(row, order)  # noqa: E731
    scores = collect(run, [result(run, "one.json", ten)])
    assert (scores.tuned, scores.base, scores.judged, scores.agreement) == (15, 5, 20, None)
    assert scores.win_rate == 0.75
    assert scores.p_value == pytest.approx(0.0413895, abs=1e-6)  # two-sided binomial, 15 of 20
    saved = json.loads((run / "human.json").read_text())
    assert saved["win_rate"] == 0.75


def test_several_judges_ties_and_rows_left_open(run):
    write_sheet(run, rows=20)
    one = result(run, "one.json", prefers("tuned"))
    two = result(
        run, "two.json", lambda row, order: ["tie", "neither", None, prefers("tuned")(row, order)][row % 4]
    )
    scores = collect(run, [one, two])
    assert (scores.judges, scores.judged) == (2, 35)
    assert (scores.tuned, scores.base, scores.tie, scores.neither) == (25, 0, 5, 5)
    assert scores.win_rate == pytest.approx(27.5 / 30)
    assert scores.agreement == pytest.approx(5 / 15)


def test_faulty_results_are_the_users_error(run):
    write_sheet(run, rows=5, seed=0)
    old = result(run, "old.json", prefers("base"))
    write_sheet(run, rows=5, seed=1)
    with pytest.raises(UserError, match="belongs to another sheet"):
        collect(run, [old])
    with pytest.raises(UserError, match="no row was judged"):
        collect(run, [result(run, "empty.json", lambda row, order: None)])
    with pytest.raises(UserError, match="row '1' cannot be 'C'"):
        collect(run, [result(run, "odd.json", lambda row, order: "C")])
    (run / "bad.json").write_text("[]")
    with pytest.raises(UserError, match="is no result of a sheet"):
        collect(run, [run / "bad.json"])


def test_without_two_answers_there_is_no_sheet(tmp_path):
    with pytest.raises(UserError, match="no answers to compare"):
        write_sheet(tmp_path)
    (tmp_path / "predictions.jsonl").write_text('{"tuned": {"answer": "a"}}\n')
    with pytest.raises(UserError, match="no row has two different answers"):
        write_sheet(tmp_path)
    with pytest.raises(UserError, match="key of the sheet is missing"):
        collect(tmp_path, [])
