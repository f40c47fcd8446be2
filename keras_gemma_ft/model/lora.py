"""LoRA as PEFT defines it: W + (alpha / rank) · B A, factored, with dropout on the adapter's input.

Hu et al. 2021, "LoRA", arXiv:2106.09685. A is [rank, in] and starts at random, B is [out, rank] and starts at
zero, so that a new adapter changes nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.weights import Weight


@dataclass(frozen=True)
class LoraConfig:
    """How adapters are made.

    Attributes:
        rank: Width.
        alpha: The adapter's output is scaled by alpha / rank.
        dropout: Share of an adapter's inputs dropped in training.
        targets: "all-linear" and roles, with commas between; see `weights.lora_targets`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str = "all-linear"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise UserError(
                f"a rank of {self.rank!r} makes no adapter",
                where="lora.rank",
                remedy="choose a whole number from 1; 16 to 64 is usual.",
            )
        if not self.alpha > 0:
            raise UserError(
                f"{self.alpha!r} is not positive", where="lora.alpha", remedy="2 × rank is usual."
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"{self.dropout!r} is no share", where="lora.dropout", remedy="choose 0 to 0.1.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weight_name(path: str) -> str:
    """Our name of a variable's weight, or of the weight that an adapter's factor is beside.

    Args:
        path: Of a variable of `GemmaCausalLM`: `gemma/own/local/q_proj/lora_a` gives `own/local/q_proj`.
    """
    return re.sub(r"/lora_[ab]$", "", path.partition("/")[2])


def shapes(weight: Weight, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the adapter of a stack of matrices [..., out, in]; each expert has one of its own."""
    *experts, out, inner = weight.shape
    stack = (*weight.layers.shape, *experts)
    return {"lora_a": (*stack, rank, inner), "lora_b": (*stack, out, rank)}


def initial(weight: Weight, rank: int, seed: int) -> dict[str, np.ndarray]:
    """A new adapter, float32: A uniform in ±sqrt(1 / in), as PEFT's kaiming_uniform_(a=sqrt(5)); B zero.

    Args:
        weight: The stack of matrices.
        rank: Width.
        seed: Together with the weight's name it determines A.
    """
    of = shapes(weight, rank)
    name = np.frombuffer(weight.name.encode(), np.uint8)
    random = np.random.default_rng([seed, *name.tolist()])
    bound = math.sqrt(1 / weight.shape[-1])
    return {
        "lora_a": random.uniform(-bound, bound, of["lora_a"]).astype(np.float32),
        "lora_b": np.zeros(of["lora_b"], np.float32),
    }
