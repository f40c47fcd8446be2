"""Does every part that should learn really learn? Judged on the gradients and updates of the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_gemma_ft.errors import UserError


@dataclass(frozen=True)
class GroupAudit:
    """One module group after the first step.

    Attributes:
        name: For example "decoder/local/q_proj".
        parameters: How many numbers it trains.
        gradient_norm: Over all of them.
        silent_layers: Places in the stack of layers whose gradient is exactly zero; `()` where the group is
            not stacked or all layers have some.
        update_norm: How far the first step moved them; None before it, and where that was not measured.
    """

    name: str
    parameters: int
    gradient_norm: float
    silent_layers: tuple[int, ...] = ()
    update_norm: float | None = None


@dataclass(frozen=True)
class Audit:
    """The first step.

    Attributes:
        loss: Of the first batch, nats a supervised token.
        supervised_tokens: In the first batch.
        groups: In the order of the model's variables.
    """

    loss: float
    supervised_tokens: int
    groups: tuple[GroupAudit, ...]

    def to_json(self) -> dict[str, Any]:
        """The record for `metrics.jsonl`: `{"step": 1, "audit": {...}}`."""
        groups = [
            {
                "name": group.name,
                "parameters": group.parameters,
                "gradient_norm": group.gradient_norm,
                "update_norm": group.update_norm,
            }
            for group in self.groups
        ]
        return {
            "step": 1,
            "audit": {"loss": self.loss, "supervised_tokens": self.supervised_tokens, "groups": groups},
        }


def module_of(path: str) -> str:
    """The group of a Keras layer's variable: its path without its own name."""
    return path.rpartition("/")[0] or path


@dataclass(frozen=True)
class Gradient:
    """What an audit needs to know of a variable's gradient.

    Attributes:
        squared: Squared norm, float [layers…] where the variable stacks layers, else [].
        size: Numbers in it.
    """

    squared: np.ndarray
    size: int

    @classmethod
    def of(cls, gradient: Any) -> Gradient:
        """That of an array of any shape, without layers."""
        values = np.asarray(gradient, np.float64)
        return cls(np.square(values).sum(), values.size)


def audit(
    loss: float,
    supervised_tokens: int,
    gradients: Mapping[str, Gradient],
    *,
    updates: Mapping[str, Any] | None = None,
    group_of: Callable[[str], str] = module_of,
) -> Audit:
    """Norms by module group.

    An adapter's A has no gradient while B is zero, so a group is judged as a whole; but each layer of a
    stacked group is judged by itself, since one dead layer among forty would hide in their common norm.

    Args:
        loss: Of the batch.
        supervised_tokens: In the batch.
        gradients: By variable path.
        updates: Value after the step minus value before, by path; None where not measured.
        group_of: Path to group name.
    """
    names = list(dict.fromkeys(group_of(path) for path in gradients))
    members = {name: [path for path in gradients if group_of(path) == name] for name in names}
    groups = tuple(_audit_group(name, members[name], gradients, updates) for name in names)
    return Audit(float(loss), int(supervised_tokens), groups)


def _audit_group(
    name: str,
    paths: Sequence[str],
    gradients: Mapping[str, Gradient],
    updates: Mapping[str, Any] | None,
) -> GroupAudit:
    by_layer = sum(np.asarray(gradients[path].squared, np.float64).ravel() for path in paths)
    silent = tuple(np.flatnonzero(by_layer == 0).tolist()) if np.size(by_layer) > 1 else ()
    moved = None
    if updates is not None:
        moved = math.sqrt(sum(float(np.square(np.asarray(updates[p], np.float64)).sum()) for p in paths))
    parameters = sum(gradients[path].size for path in paths)
    return GroupAudit(name, parameters, math.sqrt(float(np.sum(by_layer))), silent, moved)


def require_learning(audited: Audit, targets: Sequence[str] | None = None) -> None:
    """Refuses a run of which the first step shows that it will not learn what it should.

    Args:
        audited: The first step.
        targets: Names that must occur in some group's name and receive gradient, such as "q_proj"; None:
            every group must.

    Raises:
        UserError: No token is supervised, the loss or a gradient is not finite, a targeted group is missing
            or receives no gradient.
    """
    if audited.supervised_tokens == 0:
        raise UserError(
            "no token of the first batch is supervised, so there is nothing to learn from",
            where="data",
            remedy="look at the loss mask with `keras-gemma-ft data`: does data.max_length cut answers off?",
        )
    if not math.isfinite(audited.loss):
        raise UserError(
            f"the loss of the first batch is {audited.loss}",
            where="train",
            remedy="use precision 'bfloat16' or 'float32', and check that the preset's weights are whole.",
        )
    for group in audited.groups:
        if not math.isfinite(group.gradient_norm):
            raise UserError(
                f"the gradient of {group.name} is {group.gradient_norm} at step 1",
                where="train",
                remedy="use precision 'bfloat16' or 'float32'.",
            )
    if targets is None:
        chosen = list(audited.groups)
    else:
        chosen = [group for group in audited.groups if any(target in group.name for target in targets)]
        for target in targets:
            if not any(target in group.name for group in audited.groups):
                raise UserError(
                    f"the target {target!r} has no trainable variable",
                    where="lora.targets",
                    remedy="name modules that this model has, or use 'all-linear'.",
                )
    for group in chosen:
        if group.gradient_norm == 0 or group.silent_layers:
            layers = f" in layers {', '.join(map(str, group.silent_layers))}" if group.silent_layers else ""
            raise UserError(
                f"{group.name} is to be trained but receives no gradient{layers} at step 1",
                where="lora.targets",
                remedy="take it out of lora.targets; if it should learn, please report this as a defect.",
            )
