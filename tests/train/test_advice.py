"""Advice before and after training: said once, with the user's numbers, and silent where all is well."""

import pytest

from keras_gemma_ft.advice import GUIDE, Settings, as_lines, before_training
from keras_gemma_ft.evaluate.next_steps import after_training
from keras_gemma_ft.train.overfitting import KINDS
from keras_gemma_ft.train.remedies import remedies

GOOD = {
    "method": "lora",
    "lora": {"rank": 16, "alpha": 32, "dropout": 0.05},
    "train": {"learning_rate": 2e-4, "epochs": 3, "batch_size": 16, "warmup_ratio": 0.1},
    "task": {"kind": "classification"},
}


def settings(rows=1000, **changes):
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in GOOD.items()}
    for name, value in changes.items():
        if "__" in name:
            group, field = name.split("__")
            config[group][field] = value
        else:
            config[name] = value
    return Settings.from_config(config, rows=rows, steps_per_epoch=60)


def test_the_guides_own_settings_draw_no_advice():
    assert before_training(settings()) == []


@pytest.mark.parametrize(
    ("change", "value", "about"),
    [
        ("lora__rank", 8, "lora.rank"),
        ("lora__rank", 128, "lora.rank"),
        ("lora__alpha", 16, "lora.alpha"),
        ("lora__dropout", 0.0, "lora.dropout"),
        ("train__learning_rate", 1e-3, "train.learning_rate"),
        ("train__learning_rate", 1e-5, "train.learning_rate"),
        ("train__epochs", 20, "train.epochs"),
        ("train__batch_size", 64, "train.batch_size"),
        ("train__warmup_ratio", 0.0, "train.warmup_ratio"),
        ("rows", 200, "data.train"),
        ("rows", 50_000, "data.train"),
    ],
)
def test_what_is_outside_a_range_is_said_once_with_value_and_reason(change, value, about):
    advice = [item for item in before_training(settings(**{change: value})) if item.about == about]
    (item,) = advice
    assert f"{value:,g}" in item.text or f"{value:,}" in item.text
    assert ":" in item.text  # the reason
    assert as_lines(advice) == [f"{about}: {item.text}"]


def test_both_ends_of_every_range_are_inside():
    for name, recommended in GUIDE.items():
        for value in (recommended.low, recommended.high):
            assert name not in [
                a.about for a in before_training(settings(**{name.replace(".", "__"): value}))
            ]


def test_full_tuning_is_not_measured_against_the_adapters_ranges():
    advice = before_training(
        settings(method="full", lora__rank=4, train__learning_rate=1e-5, train__epochs=9)
    )
    assert [item.about for item in advice] == ["train.epochs"]


def test_dataset_sizes_follow_the_purpose():
    assert before_training(settings(rows=1000)) == []
    (advice,) = before_training(settings(rows=1000, task={"kind": "generation"}))
    assert "5,000 to 20,000 recommended for instruction tuning" in advice.text


def test_remedies_are_silent_where_nothing_is_wrong():
    for kind in KINDS:
        assert bool(remedies(kind, settings())) == (kind not in ("healthy", "warming up"))


@pytest.mark.parametrize(
    ("best_step", "epochs", "first"),
    [
        (110, 20, "Train 2 epochs instead of 20: the held-out loss was best after 1.8."),
        (61, 20, "Train 1 epoch instead of 20: the held-out loss was best after 1.0."),
        (110, 2, "Stop earlier: the held-out loss was best at step 110, after 1.8 epochs."),
    ],
)
def test_fewer_epochs_are_counted_from_the_best_step(best_step, epochs, first):
    assert remedies("overfitting", settings(train__epochs=epochs), best_step=best_step)[0] == first


def test_a_run_that_ended_at_its_best_was_not_too_long():
    short, long = (
        remedies("overfitting", settings(train__epochs=epochs), best_step=110, step=110) for epochs in (2, 20)
    )
    assert short[0].startswith("Raise lora.dropout")
    assert long[0].startswith("Train 2 epochs instead of 20")


def test_remedies_without_numbers_name_none():
    assert remedies("overfitting", Settings()) == [
        "Train fewer epochs.",
        "Add more diverse data to the training set; 500 to 5,000 are recommended.",
    ]
    assert remedies("diverged", settings())[0] == "Lower train.learning_rate from 0.0002 to 6.7e-05."


def metric(name, base, tuned, low, high, p_value, better="higher"):
    return {
        "name": name,
        "title": name,
        "better": better,
        "base": {"value": base},
        "tuned": {"value": tuned},
        "difference": {"value": tuned - base, "low": low, "high": high},
        "p_value": p_value,
    }


def texts(**evaluation):
    evaluation.setdefault("rows", 100)
    return [item.text for item in after_training(settings(), evaluation=evaluation)]


def test_a_clear_gain_needs_no_words():
    assert texts(metrics=[metric("accuracy", 0.5, 0.8, 0.2, 0.4, 1e-6)]) == []


def test_an_unclear_gain_says_how_many_rows_would_show_it():
    (text,) = texts(metrics=[metric("accuracy", 0.50, 0.55, -0.05, 0.15, 0.4)])
    assert "about 400 rows" in text  # the interval is twice as wide as the gain: four times the rows


def test_a_loss_that_rose_is_worse():
    (text,) = texts(metrics=[metric("loss", 1.0, 1.2, 0.1, 0.3, 0.001, better="lower")])
    assert "worse than the base" in text


def test_classes_form_and_forgetting():
    details = {
        "per_class": [
            {"label": "a", "support": 5, "recall": 0.0},
            {"label": "b", "support": 9, "recall": 0.9},
            {"label": "c", "support": 0, "recall": 0.0},
        ],
        "most_confused": [
            {"expected": "b", "predicted": "(invalid)", "count": 9},
            {"expected": "a", "predicted": "b", "count": 5},
        ],
    }
    found = texts(
        metrics=[metric("accuracy", 0.5, 0.8, 0.2, 0.4, 1e-6), metric("valid", 0.9, 0.7, 0, 0, 1)],
        details={"tuned": details},
        forgetting={"verdict": "forgetting", "reason": "the loss on general text rose: 1 before and 2 after"},
    )
    assert found[0] == "Never recognized: a. Add training rows for them."
    assert found[1].startswith("'a' is taken for 'b' 5 times")
    assert found[2].startswith("valid in only 70% of the answers")
    assert found[3].startswith("The loss on general text rose: 1 before and 2 after. Mix 5 to 10%")


def test_after_training_repeats_the_verdicts_remedies_and_notes_a_run_that_still_falls():
    assert [
        item.text for item in after_training(settings(), verdict={"verdict": "x", "remedies": ["Do y."]})
    ] == ["Do y."]
    (item,) = after_training(settings(), verdict={"verdict": "healthy", "remedies": []})
    assert "4 epochs may give more" in item.text
