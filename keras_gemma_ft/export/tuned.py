"""A base model with what training changed: the weights that leave."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import lora
from keras_gemma_ft.model.loading import Source
from keras_gemma_ft.model.lora import LoraConfig
from keras_gemma_ft.model.weights import Weight, table


class Tuned:
    """A `Source` of the tuned model's weights: replaced where all were trained, merged where adapters were.

    Adapters are merged into the base as its `Source` gives it: in the precision in which it was published,
    not in the quantization that it was trained beside.

    Args:
        base: The weights that training started from.
        trained: What a checkpoint holds, by our names: `own/local/q_proj/lora_a` and `…/lora_b` with
            `lora`, or whole stacks `own/local/q_proj`.
        lora: How the adapters were made; None where there are none.

    Raises:
        UserError: A trained array has no place in this base, or half of an adapter is missing.
    """

    def __init__(self, base: Source, trained: Mapping[str, np.ndarray], lora: LoraConfig | None) -> None:
        self.base = base
        self.lora = lora
        self.config = base.config
        self.dtype = base.dtype
        self.ignored = base.ignored
        self.adapters: dict[str, dict[str, np.ndarray]] = {}
        self._replaced: dict[str, np.ndarray] = {}
        weights = table(base.config)
        for name, value in trained.items():
            weight, factor = _place(name, weights, lora)
            shape = weight.stacked_shape if factor is None else _shapes(weight, lora)[factor]
            if tuple(value.shape) != shape:
                raise _misfit(f"{name} has shape {list(value.shape)}, where it has {list(shape)}")
            if factor is None:
                self._replaced[name] = value
            else:
                self.adapters.setdefault(weight.name, {})[factor] = np.asarray(value, np.float32)
        for name, factors in self.adapters.items():
            if len(factors) != 2:
                raise _misfit(f"the adapter of {name} has {', '.join(factors)} alone")

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        """One layer's weight; float32 where an adapter was merged, else as it is stored."""
        if weight.name in self._replaced:
            return np.asarray(self._replaced[weight.name][index])
        part = np.asarray(self.base.part(weight, index))
        if not self.is_merged(weight):
            return part
        a, b = (self.adapters[weight.name][factor][index] for factor in ("lora_a", "lora_b"))
        return part.astype(np.float32) + np.float32(self.scale) * (b @ a)

    def is_merged(self, weight: Weight) -> bool:
        """Whether the weight is a base's with an adapter merged into it."""
        return weight.name in self.adapters

    @property
    def scale(self) -> float:
        return 1.0 if self.lora is None else self.lora.scale

    @property
    def unmerged(self) -> Unmerged:
        """The weights beside which the adapters are computed."""
        return Unmerged(self)


class Unmerged:
    """A `Source` of a tuned model's weights without its adapters."""

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self.config, self.dtype, self.ignored = tuned.config, tuned.dtype, tuned.ignored

    def part(self, weight: Weight, index: tuple[int, ...]) -> np.ndarray:
        if self._tuned.is_merged(weight):
            return np.asarray(self._tuned.base.part(weight, index))
        return self._tuned.part(weight, index)


def _place(name: str, weights: Mapping[str, Weight], lora: LoraConfig | None) -> tuple[Weight, str | None]:
    """The weight, and the factor of its adapter, that a trained array belongs to."""
    if name in weights:
        return weights[name], None
    stem, _, factor = name.rpartition("/")
    if stem in weights and factor in ("lora_a", "lora_b") and lora is not None:
        return weights[stem], factor
    raise _misfit(f"{name} is no weight of it")


def _shapes(weight: Weight, config: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    assert config is not None, "_place lets no factor pass without"
    return lora.shapes(weight, config.rank)


def _misfit(what: str) -> UserError:
    return UserError(
        f"what was trained does not fit the base: {what}",
        where="the checkpoint",
        remedy="export with the preset, the method and the lora.* that it was trained with.",
    )
