"""Base against tuned through fakes: what is asked of the models, and what lands on disk."""

import io
import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate import comparison_table, evaluate_models, forgetting_check, general_conversations


@dataclass
class Fake:
    """Answers from a function of the question; every expected answer costs `loss` nats a character."""

    answer: object
    loss: float = 1.0
    calls: list = field(default_factory=list)

    def generate(self, prompts, max_new_tokens):
        self.calls.append(("generate", len(prompts), max_new_tokens))
        return [self.answer(prompt.messages[-1]["content"]) for prompt in prompts]

    def score(self, conversations):
        self.calls.append(("score", len(conversations)))
        lengths = np.array([len(row.messages[-1]["content"]) for row in conversations])
        return self.loss * lengths, lengths


def conversations(count=40):
    labels = ("billing", "delivery")
    return [
        Conversation(
            [
                {"role": "user", "content": f"q{n} {labels[n % 2]}"},
                {"role": "model", "content": labels[n % 2]},
            ],
            f"test.jsonl:{n + 1}",
        )
        for n in range(count)
    ]


def right(question):
    return f" {question.split()[-1]} "


def always_billing(_question):
    return "billing"


def test_base_against_tuned():
    base, tuned = Fake(always_billing, 2.0), Fake(right, 0.5)
    evaluation = evaluate_models(tuned, conversations(), base=base)
    assert evaluation.kind == "classification"
    accuracy = evaluation.metric("accuracy")
    assert (accuracy.base.value, accuracy.tuned.value) == (0.5, 1.0)
    assert accuracy.difference.value == 0.5
    assert accuracy.test == "McNemar, exact"
    assert accuracy.p_value == pytest.approx(2 / 2**20)
    loss = evaluation.metric("loss")
    assert (loss.base.value, loss.tuned.value, loss.better) == (2.0, 0.5, "lower")
    assert evaluation.metric("perplexity").tuned.value == pytest.approx(np.exp(0.5))
    assert evaluation.metric("macro_f1").base.value == pytest.approx((2 / 3 + 0) / 2)
    assert evaluation.worst() == []
    with pytest.raises(KeyError):
        evaluation.metric("bleu")
    # Each model is asked once for losses and once for answers, with room for the longest expected one.
    assert base.calls == tuned.calls == [("score", 40), ("generate", 40, 8 + int(1.25 * 4))]


def test_without_a_base_there_is_only_one_column():
    evaluation = evaluate_models(Fake(right), conversations(), max_new_tokens=5)
    assert evaluation.metric("accuracy").base is None
    assert "base" not in evaluation.details
    assert [column.header for column in comparison_table(evaluation.comparisons, rows=40).columns] == [
        "metric",
        "tuned",
    ]


def test_perplexity_generates_nothing():
    tuned = Fake(right)
    evaluation = evaluate_models(tuned, conversations(), task="perplexity")
    assert [name for name, *_ in tuned.calls] == ["score"]
    assert [comparison.name for comparison in evaluation.comparisons] == ["loss", "perplexity"]


def test_confidence_is_the_probability_of_the_models_own_answer():
    rows = conversations(2)
    earlier = {"role": "model", "content": "What is it about?"}
    rows.append(Conversation([rows[0].messages[0], earlier, *rows[0].messages], "multi"))
    evaluation = evaluate_models(Fake(always_billing, 0.1), rows, task="classification", calibrate=True)
    own = np.exp(-0.1 * len("billing"))
    assert [row.tuned.confidence for row in evaluation.rows] == [pytest.approx(own), pytest.approx(own), None]
    assert rows[1].messages[-1]["content"] == "delivery"  # the user's row is left as it was


def test_the_token_budget_counts_tokens_where_it_can():
    tuned = Fake(right)
    evaluate_models(tuned, conversations(), count_tokens=lambda text: 3 * len(text))
    assert tuned.calls[1] == ("generate", 40, 8 + int(1.25 * 24))


def test_what_is_saved(tmp_path):
    evaluation = evaluate_models(Fake(always_billing, float("nan")), conversations(6), base=Fake(right))
    evaluation.save(tmp_path, forgetting={"verdict": "none found"})
    saved = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert saved["task"] == "classification"
    assert saved["rows"] == 6
    assert saved["forgetting"] == {"verdict": "none found"}
    assert saved["metrics"][0]["tuned"]["value"] is None  # JSON has no NaN
    assert saved["worst"][0]["tuned"]["answer"] == "billing"
    assert [row["origin"] for row in saved["worst"]] == ["test.jsonl:2", "test.jsonl:4", "test.jsonl:6"]
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["base"]["correct"] for line in lines] == [True] * 6
    assert [line["tuned"]["correct"] for line in lines] == [True, False] * 3
    assert lines[0]["prompt"] == [{"role": "user", "content": "q0 billing"}]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "predictions.jsonl"]


def test_an_unwritable_place_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write there"):
        evaluate_models(Fake(right), conversations()).save(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "?"}],
        [{"role": "model", "content": "!"}],
        [{"role": "model", "content": "!"}, {"role": "user", "content": "?"}],
    ],
)
def test_a_row_without_an_expected_answer_is_named(messages):
    with pytest.raises(UserError, match=r"test\.jsonl:9: an evaluation row must end"):
        evaluate_models(Fake(right), [Conversation(messages, "test.jsonl:9")])


def test_no_rows_is_the_users_error():
    with pytest.raises(UserError, match="no held-out row"):
        evaluate_models(Fake(right), [])


def test_the_table_says_in_words_what_is_better_in_80_columns():
    from rich.console import Console

    evaluation = evaluate_models(Fake(right, 0.5), conversations(), base=Fake(always_billing, 2.0))
    console = Console(file=io.StringIO(), width=80, no_color=True)
    console.print(comparison_table(evaluation.comparisons, rows=40))
    lines = console.file.getvalue().splitlines()
    accuracy = next(line for line in lines if "accuracy" in line)
    assert "100.0%" in accuracy
    assert "+50.0 points" in accuracy
    assert "better" in accuracy
    loss = next(line for line in lines if "held-out loss" in line)
    assert "−1.500" in loss
    assert "better" in loss
    valid = next(line for line in lines if "valid labels" in line)
    assert "no clear" in valid


def test_the_general_set_ships_and_its_references_keep_their_constraints():
    from keras_gemma_ft.evaluate.instructions import check

    rows = general_conversations()
    assert 50 <= len(rows) <= 80
    constrained = [row for row in rows if row.messages[-1].get("constraints")]
    assert len(constrained) >= 40
    for row in constrained:
        answer = row.messages[-1]
        assert all(check(answer["content"], answer["constraints"]).values()), row.origin
    assert len({row.messages[-2]["content"] for row in rows}) == len(rows)


def test_forgetting_is_seen_in_loss_and_in_form():
    answers = {row.messages[-2]["content"]: row.messages[-1]["content"] for row in general_conversations()}
    base = Fake(answers.__getitem__, 1.0)
    _, record = forgetting_check(base, base)
    assert record["verdict"] == "none found"
    assert record["task"] == "instructions"
    assert record["rows"] == len(answers)

    _, record = forgetting_check(Fake(always_billing, 1.2), base)
    assert record["verdict"] == "forgetting"
    assert "rose: 1.000 before and 1.200 after" in record["reason"]
    assert "keep the form that was asked for: 100.0% before" in record["reason"]

    _, record = forgetting_check(Fake(answers.__getitem__, 1.04), base)  # within the tolerance
    assert record["verdict"] == "none found"


def test_forgetting_on_the_users_own_rows_needs_no_constraints():
    tuned = Fake(right, 1.2)
    _, record = forgetting_check(tuned, Fake(right, 1.0), conversations(), source="general_de.jsonl")
    assert (record["verdict"], record["source"], record["task"]) == (
        "forgetting",
        "general_de.jsonl",
        "perplexity",
    )
    assert [name for name, *_ in tuned.calls] == ["score"]


def test_content_in_parts_is_text():
    parts = [{"type": "text", "text": "Is it "}, {"type": "text", "text": "billing"}]
    answer = [{"type": "text", "text": "billing "}]
    row = Conversation([{"role": "user", "content": parts}, {"role": "assistant", "content": answer}], "x")
    evaluation = evaluate_models(Fake(lambda content: "billing"), [row] * 4, task="classification")
    assert evaluation.metric("accuracy").tuned.value == 1
    assert evaluation.rows[0].example.question == "Is it billing"
