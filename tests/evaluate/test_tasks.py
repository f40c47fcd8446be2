"""Every kind of task against the library that defines its metric."""

import json

import numpy as np
import pytest

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.classification import ABSTAINED, INVALID, Classification
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.extraction import Extraction
from keras_gemma_ft.evaluate.generation import Generation, import_metric_library
from keras_gemma_ft.evaluate.instructions import Instructions, check
from keras_gemma_ft.evaluate.numeric import Numeric
from keras_gemma_ft.evaluate.statistics import compare
from keras_gemma_ft.evaluate.tasks import build_task, kinds

LABELS = ["card_arrival", "card", "top up", "top up limits", "Exchange rate"]


def examples_of(references, questions=None, constraints=None):
    return [
        Example(
            ({"role": "user", "content": questions[index] if questions else "?"},),
            reference,
            f"test.jsonl:{index + 1}",
            constraints[index] if constraints else {},
        )
        for index, reference in enumerate(references)
    ]


def scored(task, predictions, references, **more):
    scores = task.score(predictions, references, examples_of(references, **more))
    return {metric.name: metric.value for metric in scores.metrics}, scores


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("card_arrival", "card_arrival"),
        (" Card_Arrival.\n", "card_arrival"),
        ("**top up**", "top up"),
        ("The intent is: card_arrival.", "card_arrival"),
        ("This is about top up limits", "top up limits"),  # and not also about top up
        ("exchange  rate", "Exchange rate"),
        ("card_arrival or top up", INVALID),
        ("cards", INVALID),
        ("something else entirely", INVALID),
        ("", ABSTAINED),
        ("I don't know.", ABSTAINED),
    ],
)
def test_reading_a_label(answer, label):
    assert Classification().read(answer, LABELS) == label


def test_labels_that_differ_only_in_case_are_kept_apart():
    assert Classification().read("US", ["us", "US"]) == "US"
    assert Classification().read("us", ["us", "US"]) == "us"


def test_a_label_may_be_a_word_of_abstention():
    assert Classification().read("unknown", ["unknown", "known"]) == "unknown"


def test_classification_equals_scikit_learn():
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

    generator = np.random.default_rng(0)
    references = list(generator.choice(LABELS[:4], 400, p=[0.5, 0.3, 0.15, 0.05]))
    noise = generator.choice([*LABELS, "gibberish", ""], 400)
    predictions = [str(n) if generator.random() < 0.4 else r for r, n in zip(references, noise, strict=True)]
    values, scores = scored(Classification(labels=LABELS), predictions, references)

    present = sorted(set(references))
    assert values["accuracy"] == accuracy_score(references, predictions)
    assert values["macro_f1"] == pytest.approx(
        f1_score(references, predictions, labels=present, average="macro", zero_division=0)
    )
    assert values["micro_f1"] == pytest.approx(
        f1_score(references, predictions, labels=LABELS, average="micro", zero_division=0)
    )
    assert values["valid"] == pytest.approx(np.mean([p in LABELS for p in predictions]))

    used = scores.details["labels"]
    expected = precision_recall_fscore_support(references, predictions, labels=used, zero_division=0)
    ours = [
        [row[key] for row in scores.details["per_class"]] for key in ("precision", "recall", "f1", "support")
    ]
    np.testing.assert_allclose(ours, expected)
    columns = scores.details["confusion"]["columns"]
    renamed = {"gibberish": INVALID, "": ABSTAINED}
    full = confusion_matrix(references, [renamed.get(p, p) for p in predictions], labels=columns)
    np.testing.assert_array_equal(scores.details["confusion"]["counts"], full[: len(used)])
    assert scores.details["invalid"] == predictions.count("gibberish")
    assert scores.details["abstained"] == predictions.count("")
    assert [outcome.correct for outcome in scores.outcomes] == [
        p == r for p, r in zip(predictions, references, strict=True)
    ]


def test_a_bootstrapped_macro_f1_is_scikit_learns_on_the_resampled_rows():
    from sklearn.metrics import f1_score

    references = ["a", "b", "c", "a"] * 10
    predictions = ["a", "b", "b", "c"] * 10
    _, scores = scored(Classification(), predictions, references)
    macro = next(metric for metric in scores.metrics if metric.name == "macro_f1")
    chosen = np.random.default_rng(0).integers(0, 30, 40)
    expected = f1_score(
        [references[i] for i in chosen], [predictions[i] for i in chosen], average="macro", zero_division=0
    )
    assert macro.combine(macro.rows[chosen].sum(0)) == pytest.approx(expected)


def test_extraction_of_slots():
    references = ['{"time": "7 pm", "people": "2"}', '{"name": "Ada Lovelace"}', "{}", '{"day": "Friday"}']
    predictions = [
        'Here: {"people": "2", "time": "7 PM"}',  # order and case do not matter
        '{"name": "Ada"}',  # half of the name
        '{"time": "8"}',  # invented
        "Friday",  # no JSON
    ]
    values, scores = scored(Extraction(), predictions, references)
    assert values["exact_match"] == 0.25
    assert values["slot_precision"] == pytest.approx(2 / 4)  # predicted: time, people, name, time
    assert values["slot_recall"] == pytest.approx(2 / 4)  # expected: time, people, name, day
    assert values["slot_f1"] == pytest.approx(0.5)
    assert values["token_f1"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert values["valid_json"] == 0.75
    assert scores.outcomes[3].note == "no JSON object"
    per_slot = {row["slot"]: row for row in scores.details["per_slot"]}
    assert per_slot["time"] == {"slot": "time", "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "support": 1}
    assert per_slot["day"]["recall"] == 0


def test_no_slots_expected_and_none_given_is_right_but_no_json_is_not():
    values, _ = scored(Extraction(), ["{}", "nothing"], ["{}", "{}"])
    assert values["exact_match"] == 0.5


def test_extraction_of_spans_is_squads():
    values, _ = scored(
        Extraction(), ["the Norman dukes", "in the 10th century"], ["Norman dukes", "10th century"]
    )
    assert values["exact_match"] == 0.5
    assert values["token_f1"] == pytest.approx((1 + 0.8) / 2)


def test_numeric_answers_need_the_marker_where_the_references_have_it():
    answers = ["so #### 18", "so it is 18", "#### 19", "no idea"]
    values, scores = scored(Numeric(), answers, ["a\n#### 18"] * 4)
    assert values == {"accuracy": 0.25, "accuracy_last_number": 0.5, "answered": 0.5}
    assert [outcome.note for outcome in scores.outcomes] == ["", "no final number", "", "no final number"]
    assert scored(Numeric(), ["it is 1,800.0"], ["1800"])[0]["accuracy"] == 1


def sentences():
    references = [
        "the cat sat on the mat and looked at the dog",
        "there is a large garden behind the old house",
        "please send the report before friday noon",
        "nobody expected the train to arrive on time",
    ]
    predictions = [
        "the cat sat on a mat and looked at the dog",
        "behind the old house there is a large garden",
        "",
        "nobody expected that the train would arrive on time",
    ]
    return predictions, references


def test_generation_equals_sacrebleu_and_rouge_score():
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    predictions, references = sentences()
    values, scores = scored(Generation(), predictions, references)
    bleu, chrf = sacrebleu.BLEU(), sacrebleu.CHRF()
    assert values["bleu"] == pytest.approx(bleu.corpus_score(predictions, [references]).score, abs=1e-9)
    assert values["chrf"] == pytest.approx(chrf.corpus_score(predictions, [references]).score, abs=1e-9)
    assert scores.details["signatures"]["bleu"] == str(bleu.get_signature())
    assert scores.details["signatures"]["chrf"] == str(chrf.get_signature())
    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = [rouge.score(r, p)[name].fmeasure for p, r in zip(predictions, references, strict=True)]
        assert values[name.lower()] == pytest.approx(np.mean(expected))
    assert scores.outcomes[2].note == "empty answer"


def test_a_resampled_bleu_is_sacrebleus_on_the_resampled_rows():
    import sacrebleu

    predictions, references = sentences()
    _, scores = scored(Generation(), predictions, references)
    rows = [0, 0, 1, 3, 3]
    for name, scorer in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        metric = next(metric for metric in scores.metrics if metric.name == name)
        expected = scorer.corpus_score([predictions[i] for i in rows], [[references[i] for i in rows]]).score
        assert metric.combine(metric.rows[rows].sum(0)) == pytest.approx(expected, abs=1e-9)


def test_a_missing_metric_library_names_the_extra():
    with pytest.raises(UserError, match=r"pip install 'keras-gemma-ft\[eval\]'"):
        import_metric_library("a_library_that_nobody_has")


@pytest.mark.parametrize(
    ("constraint", "value", "good", "bad"),
    [
        ("json_schema", {"type": "object", "required": ["a"]}, '{"a": 1}', '{"b": 1}'),
        ("json_schema", {"type": "array"}, "```json\n[1]\n```", "Here: [1]"),
        ("regex", r"\d+ km", "It is 12 km.", "It is 12 miles."),
        ("full_match", "yes|no", "YES", "yes, of course"),
        ("keywords", ["refund"], "Your Refund is here", "refundable"),
        ("forbidden", ["sorry"], "Of course", "Sorry, no"),
        ("min_words", 3, "one two three", "one two"),
        ("max_words", 3, "one two three", "one two three four"),
        ("max_words", 3, "one", ""),
        ("max_characters", 4, "four", "fives"),
        ("max_sentences", 1, "Pi is 3.14 or so.", "One. Two."),
        ("max_lines", 1, "one", "one\ntwo"),
        ("starts_with", "Dear", "Dear Anna", "Hi Anna"),
        ("ends_with", ".", "Done. ", "Done"),
    ],
)
def test_constraints(constraint, value, good, bad):
    assert check(good, {constraint: value}) == {constraint: True}
    assert check(bad, {constraint: value}) == {constraint: False}


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ({"max_wrods": 3}, "no constraint 'max_wrods'"),
        ({"regex": "("}, "'regex' cannot be checked"),
        ({"max_words": "three"}, "'max_words' cannot be checked"),
        ({"json_schema": {"type": "thing"}}, "'json_schema' cannot be checked"),
    ],
)
def test_a_faulty_constraint_is_the_users_error(constraints, message):
    with pytest.raises(UserError, match=message):
        check('{"a": 1}', constraints, where="eval.jsonl:3")


def test_instructions_count_rows_that_keep_everything_and_constraints_kept():
    constraints = [{"max_words": 2, "keywords": ["blue"]}, {"ends_with": "."}, {}]
    values, scores = scored(
        Instructions(), ["deep blue sea", "fine.", "whatever"], ["x", "y", "z"], constraints=constraints
    )
    assert values == {"followed": pytest.approx(1 / 2), "constraints": pytest.approx(2 / 3)}
    assert scores.outcomes[0].note == "broken: max_words"
    assert scores.outcomes[2].correct is None  # nothing was asked
    (followed,) = compare(scores.metrics[:1], scores.metrics[:1])
    assert followed.test == "McNemar, exact"


DETECTED = {
    "classification": examples_of(["billing", "delivery", "billing", "delivery"] * 5),
    "numeric": examples_of([f"so it is\n#### {n}" for n in range(20)]),
    "extraction": examples_of([json.dumps({"time": str(n % 3)}) for n in range(20)]),
    "generation": examples_of([f"A different long answer, number {n}, about something." for n in range(20)]),
    "instructions": examples_of(["x"] * 20, constraints=[{"max_words": 3}] * 20),
}


@pytest.mark.parametrize("kind", DETECTED)
def test_detection(kind):
    assert build_task("auto", DETECTED[kind]).kind == kind


def test_detection_of_spans_bare_numbers_and_labels_known_from_training():
    spans = examples_of(
        [f"name {n}" for n in range(9)], questions=[f"My name is Name {n}, hi" for n in range(9)]
    )
    assert build_task("auto", spans).kind == "extraction"
    assert build_task("auto", examples_of([str(n) for n in range(9)])).kind == "numeric"
    assert build_task("auto", examples_of(["0", "1"] * 9)).kind == "classification"
    few = examples_of(["a", "b", "c"])
    assert build_task("auto", few).kind != "classification"
    assert build_task("auto", few, labels=["a", "b", "c", "d"]).kind == "classification"
    # A prompt that lists the labels does not make them spans.
    listed = examples_of(["red", "blue"] * 5, questions=["Red or blue?"] * 10)
    assert build_task("auto", listed).kind == "classification"


def test_detection_on_the_public_datasets(shared):
    import csv

    with open(shared / "datasets/banking77/test.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    banking = examples_of([row["category"] for row in rows], questions=[row["text"] for row in rows])
    assert build_task("auto", banking).kind == "classification"
    with open(shared / "datasets/gsm8k/test.jsonl") as lines:
        gsm = examples_of([json.loads(line)["answer"] for line in lines])
    assert build_task("auto", gsm).kind == "numeric"


def test_unknown_kinds_and_settings_are_the_users_error():
    with pytest.raises(UserError, match="no task kind 'clasification'"):
        build_task("clasification", [])
    with pytest.raises(UserError, match="no setting 'labels'"):
        build_task("numeric", [], labels=["a"])
    assert build_task("perplexity", []).generates is False
    assert list(kinds())[-2:] == ["generation", "perplexity"]
