"""What a training step must compute, and what a device can: their ratio is the utilization of model FLOPs."""

from __future__ import annotations

import re

import jax

from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import table

# Dense bfloat16 FLOP/s by the name that JAX gives a device; from the vendors' data sheets. The first match
# counts.
_PEAKS = {
    r"B200|B300": 2.25e15,
    r"H200|H100.*HBM3|GH200": 989e12,
    r"H100": 756e12,  # PCIe
    r"A100": 312e12,
    r"L40S": 362e12,
    r"L4\b": 121e12,
    r"TPU v6 ?(lite|e)": 918e12,
    r"TPU v5 ?(lite|e)": 197e12,
    r"TPU v5": 459e12,
    r"TPU v4": 275e12,
}


def floor_flops(config: Gemma4Config, tokens: int, all_weights: bool = False) -> float:
    """FLOPs of the matrix products that no step can do without; attention's own are not counted.

    For N numbers in the matrices that a token meets, those of the vocabulary included: 2 N a token forward
    and 2 N for the gradients of activations, and with `all_weights` 2 N for those of weights.
    """
    active = float(config.vocab_size * config.hidden_size)
    for weight in table(config).values():
        if weight.use == "matrix":
            active += weight.size
        elif weight.use == "experts":
            active += weight.size * config.top_k_experts / config.num_experts
    return (6 if all_weights else 4) * active * tokens


def peak_flops(device_kind: str | None = None) -> float | None:
    """Dense bfloat16 FLOP/s of a kind of device; None where that is not known, as for CPUs.

    Args:
        device_kind: JAX's name; None: that of the devices here.
    """
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    return next((peak for pattern, peak in _PEAKS.items() if re.search(pattern, kind)), None)
