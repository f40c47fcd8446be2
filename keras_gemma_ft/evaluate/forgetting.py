"""What fine-tuning cost: the tuned model against its base on things it was not tuned for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.evaluate.compare import Evaluation, Model, evaluate_models
from keras_gemma_ft.evaluate.table import shown
from keras_gemma_ft.json_files import read_lines

# Nats a token: a loss 0.05 higher makes the expected answers' tokens 5% less likely, which is small beside
# what a tuned style costs by itself.
_TOLERANCE = 0.05
_ALPHA = 0.05


def general_conversations() -> list[Conversation]:
    """The shipped general set: short everyday requests, most with constraints that can be checked."""
    with resources.as_file(resources.files(__package__).joinpath("general.jsonl")) as path:
        return [
            Conversation(record["messages"], f"general.jsonl:{number}")
            for number, record in enumerate(read_lines(path), 1)
        ]


def forgetting_check(
    tuned: Model,
    base: Model,
    conversations: Sequence[Conversation] | None = None,
    *,
    source: str = "the general set that ships",
    **options: Any,
) -> tuple[Evaluation, dict[str, Any]]:
    """Loss and format compliance before and after, on rows that have nothing to do with the tuning data.

    Args:
        tuned: The tuned model.
        base: Its base.
        conversations: The user's general rows; None: the set that ships.
        source: What the report calls them.
        options: Of `evaluate_models`.

    Returns:
        The evaluation, and its record for `evaluation.json`: verdict ("forgetting" or "none found"), reason,
        source, rows and metrics.
    """
    rows = general_conversations() if conversations is None else conversations
    constrained = any(row.messages[-1].get("constraints") for row in rows)
    options.setdefault("task", "instructions" if constrained else "perplexity")
    evaluation = evaluate_models(tuned, rows, base=base, **options)
    verdict, reason = _judge(evaluation)
    summary = evaluation.to_json()
    record = {key: summary[key] for key in ("task", "rows", "confidence", "metrics", "details")}
    return evaluation, {"verdict": verdict, "reason": reason, "source": source, **record}


def _judge(evaluation: Evaluation) -> tuple[str, str]:
    reasons = []
    loss = evaluation.metric("loss")
    assert loss.base is not None and loss.difference is not None  # there is a base
    change = f"{loss.base.value:.3f} before and {loss.tuned.value:.3f} after"
    if loss.difference.low > _TOLERANCE:
        reasons.append(f"the loss on general text rose: {change}")
    for comparison in evaluation.comparisons:
        if comparison.name == "followed" and comparison.base and comparison.difference:
            fell = comparison.difference.value < 0 and (comparison.p_value or 0) < _ALPHA
            before, after = (shown("followed", side.value) for side in (comparison.base, comparison.tuned))
            if fell:
                reasons.append(
                    f"fewer answers keep the form that was asked for: {before} before and {after} after"
                )
    if reasons:
        return "forgetting", "; ".join(reasons)
    return "none found", f"the loss on general text was {change}"
