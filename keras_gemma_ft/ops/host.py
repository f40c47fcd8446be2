"""Tables in the host's memory, of which a step fetches only the rows that it looks up.

For tables too large for the device's memory that are read, and never multiplied: the rows are gathered by the
host's processor, inside the program, and what crosses the bus is the rows.
"""

from typing import Any

import jax
from jax.experimental import compute_on


def place(table: Any) -> jax.Array:
    """Puts an array [V, D] of numpy's or JAX's into memory of the host from which the first device can read.

    Raises:
        NotImplementedError: The device knows no such memory.
    """
    device = jax.local_devices()[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if "pinned_host" not in kinds:
        raise NotImplementedError(
            f"{device.device_kind} reads no memory of the host, only {', '.join(kinds)}"
        )
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    return jax.device_put(table, sharding)


def holds(table: Any) -> bool:
    """Whether an array, or one that is being traced, lies in the host's memory."""
    return jax.typeof(table).memory_space == jax.memory.Space.Host


def gather_rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` (int [...]) of a table [V, D] that `place` gave, on the device, [..., D]; no gradient."""
    rows = _on_host(
        lambda table, ids: table[ids], compute_type="device_host", out_memory_spaces=jax.memory.Space.Host
    )(jax.lax.stop_gradient(table), jax.device_put(ids, jax.memory.Space.Host))
    return jax.device_put(rows, jax.memory.Space.Device)


# Until jax 0.10 `compute_on` is a context manager, and this function has another name.
_on_host: Any = getattr(compute_on, "compute_on2", None) or compute_on.compute_on
