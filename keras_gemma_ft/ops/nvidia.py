"""What the first device is, for kernels written for NVIDIA GPUs."""

import jax

LEAST = 8.0  # the first compute capability whose matrix units know bfloat16


def compute_capability() -> float | None:
    """The GPU's; None on devices that are no NVIDIA GPU."""
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
        raise NotImplementedError(
            f"needs an NVIDIA GPU of compute capability {LEAST} or more, this is {kind}"
        )
