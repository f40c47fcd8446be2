"""Advice after training: what to try next, from what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from keras_gemma_ft.advice import Advice, Settings, number

# A share of malformed answers above this is worth a word.
_TOLERATED = 0.02


def after_training(
    settings: Settings,
    *,
    verdict: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> list[Advice]:
    """What to try next.

    Args:
        settings: The user's numbers.
        verdict: The last verdict's record (`Verdict.to_json()`).
        evaluation: What `evaluation.json` holds.
    """
    advice = []
    if verdict:
        about = verdict["verdict"]
        advice += [Advice(about, text) for text in verdict.get("remedies", ())]
        if verdict["verdict"] == "healthy" and settings.epochs and settings.epochs < 5:
            more = number(min(5, settings.epochs + 1))
            advice.append(
                Advice(about, f"The loss was still falling at the end: {more} epochs may give more.")
            )
    if evaluation:
        advice += _on_metrics(evaluation) + _on_classes(evaluation) + _on_form(evaluation)
        advice += _on_forgetting(evaluation)
    return advice


def _on_metrics(evaluation: Mapping[str, Any]) -> list[Advice]:
    """Whether the tuned model is better at the task, by its first metric and the paired test."""
    metrics = evaluation.get("metrics") or []
    main = next(
        (m for m in metrics if m["name"] not in ("loss", "perplexity")), metrics[0] if metrics else None
    )
    if main is None or not main.get("difference") or main["difference"]["value"] is None:
        return []
    change, title, rows = main["difference"], main["title"], evaluation["rows"]
    gain = change["value"] if main["better"] == "higher" else -change["value"]
    if main["p_value"] < 0.05:
        if gain > 0:
            return []
        text = f"The {title} is worse than the base's: are the expected answers of the worst examples right?"
        return [Advice("evaluation", text)]
    text = f"No clear difference in {title} on {rows:,} held-out rows (p = {main['p_value']:.2f})."
    half = (change["high"] - change["low"]) / 2
    if 0 < gain < half:
        # Intervals narrow with the square root of the number of rows.
        text += f" If the gain is real, about {math.ceil(rows * (half / gain) ** 2):,} rows would show it."
    return [Advice("evaluation", text)]


def _on_classes(evaluation: Mapping[str, Any]) -> list[Advice]:
    details = (evaluation.get("details") or {}).get("tuned") or {}
    advice = []
    never = [row["label"] for row in details.get("per_class", ()) if row["support"] and not row["recall"]]
    if never:
        more = f" and {len(never) - 3} more" if len(never) > 3 else ""
        text = f"Never recognized: {', '.join(never[:3])}{more}. Add training rows for them."
        advice.append(Advice("classes", text))
    pairs = [pair for pair in details.get("most_confused", ()) if not pair["predicted"].startswith("(")]
    if pairs and pairs[0]["count"] > max(2, 0.01 * evaluation["rows"]):
        expected, predicted, count = (pairs[0][key] for key in ("expected", "predicted", "count"))
        text = (
            f"'{expected}' is taken for '{predicted}' {count} times: check those labels, "
            f"and add rows that tell the two apart."
        )
        advice.append(Advice("classes", text))
    return advice


def _on_form(evaluation: Mapping[str, Any]) -> list[Advice]:
    """Answers that cannot be read at all."""
    advice = []
    for metric in evaluation.get("metrics", ()):
        value = metric["tuned"]["value"]
        if (
            metric["name"] in ("valid", "valid_json", "answered")
            and value is not None
            and value < 1 - _TOLERATED
        ):
            text = (
                f"{metric['title']} in only {100 * value:.0f}% of the answers: say in the prompt "
                "what form is "
                f"wanted, and check that no training answer was cut at data.max_length."
            )
            advice.append(Advice("form", text))
    return advice


def _on_forgetting(evaluation: Mapping[str, Any]) -> list[Advice]:
    forgetting: Mapping[str, Any] = evaluation.get("forgetting") or {}
    if forgetting.get("verdict") != "forgetting":
        return []
    reason = forgetting["reason"]
    text = (
        f"{reason[:1].upper()}{reason[1:]}. Mix 5 to 10% of general rows into the training data, "
        f"or lower train.learning_rate or train.epochs."
    )
    return [Advice("forgetting", text)]
