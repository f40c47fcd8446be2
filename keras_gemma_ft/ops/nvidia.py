"""What kernels for NVIDIA GPUs share: the Triton backend of Pallas, and the devices that they are for."""

from typing import Any

import jax
import jax.numpy as jnp

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # deprecated since jax 0.11; without it the kernels decline
    plgpu = None  # type: ignore[assignment]

LEAST = 8.0  # the first compute capability whose matrix units know bfloat16


def compute_capability() -> float | None:
    """The first device's; None where it is no NVIDIA GPU."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return float(capability) if capability.replace(".", "", 1).isdigit() else None


def require() -> None:
    """Declines where the device is none that the kernels are for.

    Raises:
        NotImplementedError: No NVIDIA GPU of compute capability 8.0 or more.
    """
    capability = compute_capability()
    if capability is None or capability < LEAST:
        kind = jax.devices()[0].device_kind
        needed = f"an NVIDIA GPU of compute capability {LEAST} or more"
        raise NotImplementedError(f"needs {needed}, this is {kind}")


def dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """The float32 product of two matrices over one axis of each (`pl.dot` is gone from jax 0.12)."""
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def compiler_params(tiling: Any) -> Any:
    """What Triton is told of a tiling with `warps` and `stages`."""
    return plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages)
