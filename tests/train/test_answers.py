"""Questions and answers of a run, on the embedded preset."""

import dataclasses

import pytest

from keras_gemma_ft.data.prepare import prepare
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.train.answers import Answers, as_line, questions

PROMPTS = [f"Where do I pay for permit number {number}?" for number in range(20, 32)]
LONGEST = 12


@pytest.fixture(scope="module")
def model():
    return GemmaCausalLM.from_preset("gemma4_tiny", dtype="float32")


@pytest.fixture(scope="module")
def own_answers(model):
    return model.generate(PROMPTS, LONGEST)


def prepared(directory, model, answers):
    rows = [
        Conversation(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], f"rows:{number}"
        )
        for number, (prompt, answer) in enumerate(zip(PROMPTS, answers, strict=True), 1)
    ]
    recipe = Recipe(Template("edge"), 96, False, "drop", 0)
    return prepare(rows, directory, model.tokenizer, recipe, {"rows": str(directory)})


def test_questions_are_the_last_answers_of_examples(tmp_path, model):
    rows = prepared(tmp_path / "rows", model, [f"counter {number}" for number in range(len(PROMPTS))])
    asked = questions(rows, 5)
    decode = model.tokenizer.decode
    assert len(asked) == 5
    assert len(questions(rows, 100)) == len(PROMPTS)
    for question in asked:
        prompt, answer = decode(question.prompt.tolist()), decode(question.answer.tolist())
        assert prompt.endswith("<|turn>model\n")
        number = PROMPTS.index(prompt.split("user\n")[1].split("<turn|>")[0])
        assert answer.strip() == f"counter {number}<turn|>"


def test_what_is_known_by_heart_is_counted(tmp_path, model, own_answers):
    known = prepared(tmp_path / "known", model, own_answers)
    unknown = prepared(tmp_path / "unknown", model, ["counter 7"] * len(PROMPTS))
    found = Answers(model, known, unknown, count=10).reproduction()
    # An answer that was cut off by `LONGEST` does not end where the expected one does.
    places = questions_places(known, model, 10)
    longer = model.generate([PROMPTS[place] for place in places], 2 * LONGEST)
    whole = sum(answer == own_answers[place] for place, answer in zip(places, longer, strict=True))
    assert (found.trained, found.trained_of) == (whole, 10)
    assert whole > 0
    assert (found.held_out, found.held_out_of) == (0, 10)


def questions_places(rows, model, count):
    texts = [model.tokenizer.decode(question.prompt.tolist()) for question in questions(rows, count)]
    return [next(place for place, prompt in enumerate(PROMPTS) if prompt in text) for text in texts]


def test_samples_are_what_the_model_generates(tmp_path, model, own_answers):
    rows = prepared(tmp_path / "rows", model, ["counter 7"] * len(PROMPTS))
    samples, score = Answers(model, rows, rows, count=12, shown=2).samples()
    assert score is None
    assert [sample["prompt"] for sample in samples] == PROMPTS[:2]
    assert {sample["expected"].strip() for sample in samples} == {"counter 7"}
    longest = len(questions(rows, 12)[0].answer)
    for sample, prompt in zip(samples, PROMPTS, strict=False):
        assert sample["answer"].strip() == model.generate(prompt, longest).strip()


def test_a_prompt_that_leaves_no_room_for_an_answer_is_not_asked(tmp_path, model, monkeypatch):
    rows = prepared(tmp_path / "rows", model, ["counter 7"] * len(PROMPTS))
    short = min(len(question.prompt) for question in questions(rows, 12))
    room = short + len(questions(rows, 12)[0].answer)
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_position_embeddings=room))
    asked = Answers(model, rows, rows, count=12)._held_out
    assert 0 < len(asked) <= 12
    assert {len(question.prompt) for question in asked} == {short}
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_position_embeddings=room - 1))
    assert Answers(model, rows, rows, count=12).samples() == ([], None)


def test_a_line_says_what_was_expected_where_that_differs():
    sample = {"prompt": "x" * 60, "expected": "card arrival\n", "answer": "card  arrival"}
    assert as_line(sample) == f"'… {'x' * 50}' → 'card arrival'"
    assert as_line({**sample, "answer": "no"}).endswith("→ 'no'  (expected 'card arrival')")


def test_with_a_metric_all_held_out_answers_are_scored_whole(tmp_path, model, own_answers):
    """Half of what is expected is what the model answers, and some of that has more than the usual length."""
    expected = [answer if place % 2 else "counter 7" for place, answer in enumerate(own_answers)]
    rows = prepared(tmp_path / "rows", model, expected)
    seen = []

    def share_right(samples):
        seen.extend(samples)
        return sum(sample["answer"].strip() == sample["expected"].strip() for sample in samples) / len(
            samples
        )

    answers = Answers(model, rows, rows, count=12, shown=2, metric=share_right)
    samples, score = answers.samples()
    assert len(samples) == 2
    assert [sample["prompt"] for sample in seen] == PROMPTS
    whole = sum(
        model.generate(PROMPTS[place], 2 * LONGEST).strip() == expected[place].strip() for place in range(12)
    )
    assert score == whole / 12
    assert 0 < score < 1


def test_a_metric_without_anything_to_score_is_refused(tmp_path, model, monkeypatch):
    rows = prepared(tmp_path / "rows", model, ["counter 7"] * len(PROMPTS))
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, max_position_embeddings=8))
    with pytest.raises(UserError, match="no held-out prompt leaves room for an answer of"):
        Answers(model, rows, rows, count=12, metric=lambda samples: 0.0)
