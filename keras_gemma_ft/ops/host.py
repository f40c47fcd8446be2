"""Tables in the host's memory, of which a step fetches only the rows that it looks up.

For tables too large for the device's memory that are read, and never multiplied: what crosses the bus is the
rows. NVIDIA GPUs read them themselves; for other devices the host's processor gathers them, in the program.
"""

from typing import Any

import jax
from jax.experimental import compute_on
from jax.experimental import pallas as pl

from keras_gemma_ft.ops import nvidia
from keras_gemma_ft.ops.nvidia import plgpu


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
    table = jax.lax.stop_gradient(table)
    if plgpu is not None and (nvidia.compute_capability() or 0) >= nvidia.LEAST:
        return read_rows(table, ids)
    rows = _on_host(
        lambda table, ids: table[ids], compute_type="device_host", out_memory_spaces=jax.memory.Space.Host
    )(table, jax.device_put(ids, jax.memory.Space.Host))
    return jax.device_put(rows, jax.memory.Space.Device)


def read_rows(table: jax.Array, ids: jax.Array, interpret: bool = False) -> jax.Array:
    """`gather_rows` by a kernel of the GPU, which reads the host's pinned memory over the bus itself.

    8,192 rows of 10,752 bfloat16 take 3.6 ms so, at the bus's speed, and 11 to 45 where the host gathers
    them for the GPU to copy (H200, jax 0.11.2).
    """
    width = table.shape[1]
    piece = min(width & -width, 1024)  # a power of two

    def kernel(table_ref, ids_ref, rows_ref):
        row, columns = pl.program_id(0), pl.ds(pl.program_id(1) * piece, piece)
        plgpu.store(rows_ref.at[row, columns], plgpu.load(table_ref.at[ids_ref[row], columns]))

    rows = pl.pallas_call(
        kernel,
        grid=(ids.size, width // piece),
        out_shape=jax.ShapeDtypeStruct((ids.size, width), table.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="read_rows",
    )(table, ids.reshape(-1))
    return rows.reshape(*ids.shape, width)


# Until jax 0.10 `compute_on` is a context manager, and this function has another name.
_on_host: Any = getattr(compute_on, "compute_on2", None) or compute_on.compute_on
