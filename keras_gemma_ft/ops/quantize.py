"""Quantized weights: what a frozen matrix is stored as, and the products and look-ups that read it.

Two kinds: "nf4" (ops/nf4.py, 4.127 bits a weight) and "int8" (one scale for each output row). A
`QuantizedTensor` is a pytree whose leading axes may stack layers, groups or experts, so `lax.scan` and
indexing slice it like an array; its last two axes are always one matrix [out, in].

Nothing keeps a dequantized copy: `linears` dequantizes once in the forward and again in the backward pass,
each time where the product needs it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from keras_gemma_ft.ops import nf4

Kind = Literal["nf4", "int8"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedTensor:
    """A stack [...] of quantized matrices [out, in].

    Attributes:
        codes: nf4: uint8 [..., out, in/2], two codes a byte, the first in the high nibble; int8: int8 [...,
            out, in].
        absmax: nf4: the scale of each block of 64, [..., out·in/64], as uint8 codes, or as float32 where the
            scales are not quantized; int8: float32 [..., out], the largest magnitude of each row.
        nested: float32 [..., ceil(out·in/64/256)], the scales of the scales; None without double
            quantization.
        offset: float32 [...], the mean of the scales; None without double quantization.
        kind: "nf4" or "int8".
    """

    codes: jax.Array
    absmax: jax.Array
    nested: jax.Array | None
    offset: jax.Array | None
    kind: Kind = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape, [..., out, in]."""
        *stack, columns = self.codes.shape
        return (*stack, 2 * columns if self.kind == "nf4" else columns)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        """Indexes the leading axes, as `array[index]` would."""
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placed:
    """A matrix, or a stack, where it lies in a larger stack: the product that reads it takes it out there.

    Attributes:
        stack: The larger one.
        place: int32 [n], the place in its first n axes.
    """

    stack: QuantizedTensor
    place: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of what is taken."""
        return self.stack.shape[self.place.shape[0] :]


Quantized: TypeAlias = QuantizedTensor | Placed


def take(stacks: Any, place: jax.Array) -> Any:
    """Of each array of a pytree, whose leading axes stack what follows, what is at `place`, int32 [axes]."""

    def one(stack: jax.Array) -> jax.Array:
        rest = stack.shape[place.shape[0] :]
        start = [*place, *[0] * len(rest)]
        return jax.lax.dynamic_slice(stack, start, (1,) * place.shape[0] + rest).reshape(rest)

    return jax.tree.map(one, stacks)


@partial(jax.jit, static_argnames=("kind", "double"))
def quantize(weight: jax.typing.ArrayLike, kind: Kind = "nf4", double: bool = True) -> QuantizedTensor:
    """Quantizes weights [..., out, in] (float32, bfloat16 or float16), each matrix by itself.

    The bits do not depend on the device: give it a host array under `jax.default_device(cpu)` to quantize on
    the host.

    Args:
        weight: [..., out, in]. NF4 needs `in` even and `out · in` divisible by 64 (see
            `nf4.quantize_blocks`).
        kind: "nf4" or "int8".
        double: Quantize the NF4 scales too. Ignored for int8.

    Raises:
        ValueError: Unknown kind, or a shape that NF4 cannot store.
    """
    weight = jnp.asarray(weight)
    if kind == "int8":
        absmax = jnp.max(jnp.abs(weight), axis=-1).astype(jnp.float32)
        scale = 127 * nf4.reciprocal(absmax)[..., None]
        return QuantizedTensor(jnp.rint(weight * scale).astype(jnp.int8), absmax, None, None, "int8")
    if kind != "nf4":
        raise ValueError(f"quantization kind must be 'nf4' or 'int8', got {kind!r}")
    codes, absmax = nf4.quantize_blocks(weight)
    nested, offset = None, None
    if double:
        absmax, nested, offset = nf4.quantize_absmax(absmax)
    return QuantizedTensor(codes, absmax, nested, offset, "nf4")


def quantize_pieces(
    pieces: Iterable[jax.typing.ArrayLike], rows: int, kind: Kind = "nf4", double: bool = True
) -> QuantizedTensor:
    """`quantize(concatenate(pieces))` of one matrix, bit for bit, holding one unquantized piece at a time.

    For tensors too large to sit beside their quantized copy (an embedding table, streamed from its file).

    Args:
        pieces: Consecutive rows [n, in]; for NF4 whole blocks of them, n · in divisible by 64.
        rows: Of all pieces.
        kind: As for `quantize`.
        double: As for `quantize`.

    Raises:
        ValueError: As for `quantize`.
    """
    tensor: Any = None
    done = 0
    for piece in pieces:
        part = quantize(piece, kind, double=False)
        count = part.shape[0]
        if tensor is None:
            tensor = jax.tree.map(partial(_zeros_of_rows, rows, count), part)
        # NF4 has many scales for a row, or one for several.
        starts = jax.tree.map(lambda leaf: np.int32(done * leaf.shape[0] // count), part)  # noqa: B023
        tensor, done = _put(tensor, part, starts), done + count
    if kind == "int8" or not double:
        return tensor
    absmax, nested, offset = jax.jit(nf4.quantize_absmax)(tensor.absmax)
    return QuantizedTensor(tensor.codes, absmax, nested, offset, "nf4")


def _zeros_of_rows(rows: int, count: int, leaf: jax.Array) -> jax.Array:
    """For `rows` rows, where `leaf` is for `count`."""
    return jnp.zeros((leaf.shape[0] * rows // count, *leaf.shape[1:]), leaf.dtype)


@partial(jax.jit, donate_argnums=0)
def _put(tensor: Any, part: Any, starts: Any) -> Any:
    return jax.tree.map(partial(jax.lax.dynamic_update_slice_in_dim, axis=0), tensor, part, starts)


def dequantize(tensor: QuantizedTensor, dtype: jax.typing.DTypeLike = jnp.bfloat16) -> jax.Array:
    """The weights [..., out, in] in `dtype`."""
    if tensor.kind == "int8":
        return _int8_values(tensor.codes, tensor.absmax, dtype)
    absmax = tensor.absmax
    if tensor.nested is not None and tensor.offset is not None:
        # Behind the barrier the scales are computed once each, not once for each weight.
        absmax = jax.lax.optimization_barrier(nf4.dequantize_absmax(absmax, tensor.nested, tensor.offset))
    return nf4.dequantize_blocks(tensor.codes, absmax, dtype)


def dequantized_after(x: jax.Array, matrix: Quantized, before: Any = ()) -> tuple[jax.Array, jax.Array, Any]:
    """x, a quantized matrix or stack in x's dtype that exists no sooner than x and `before`, and `before`.

    A placed one is taken out of its stack behind the barrier, too, as a part of dequantizing it.
    """
    if isinstance(matrix, Placed):
        x, before, place = jax.lax.optimization_barrier((x, before, matrix.place))
        tensor = take(matrix.stack, place)
    else:
        x, before, tensor = jax.lax.optimization_barrier((x, before, matrix))
    return x, dequantize(tensor, x.dtype), before


def gather_rows(
    tensor: QuantizedTensor, ids: jax.Array, dtype: jax.typing.DTypeLike = jnp.bfloat16
) -> jax.Array:
    """Rows `ids` (int [...]) of one quantized matrix, [..., in] in `dtype`; no other row is dequantized.

    For embedding tables: equals `dequantize(tensor, dtype)[ids]` bit for bit.
    """
    if tensor.kind == "int8":
        return _int8_values(tensor.codes[ids], tensor.absmax[ids], dtype)
    return nf4.dequantize_rows(tensor.codes, tensor.absmax, tensor.nested, tensor.offset, ids, dtype)


def _int8_values(codes: jax.Array, absmax: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return (codes.astype(jnp.float32) * (absmax * np.float32(1 / 127))[..., None]).astype(dtype)


@jax.custom_vjp
def linears(x: jax.Array, matrices: Sequence[Quantized]) -> list[jax.Array]:
    """x [..., in] times each of some quantized matrices [out, in], transposed: [..., out] in x's dtype.

    The gradient is taken with respect to x only. Each pass dequantizes for itself and one matrix after the
    other, behind optimization barriers that wait for the pass's own input and for the product before: the
    compiler can neither keep a dequantized weight from one pass to the other nor dequantize weights ahead of
    their use.
    """
    outputs: list[jax.Array] = []
    for matrix in matrices:
        x, weight, outputs = dequantized_after(x, matrix, outputs)
        outputs = [*outputs, jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))]
    return outputs


def _linears_forward(
    x: jax.Array, matrices: Sequence[Quantized]
) -> tuple[list[jax.Array], Sequence[Quantized]]:
    return linears(x, matrices), matrices


def _linears_backward(matrices: Sequence[Quantized], dys: list[jax.Array]) -> tuple[jax.Array, None]:
    dx: jax.Array | None = None
    for matrix, dy in zip(matrices, dys, strict=True):
        dy, weight, dx = dequantized_after(dy, matrix, dx)
        product = jax.lax.dot_general(dy, weight, (((dy.ndim - 1,), (0,)), ((), ())))
        dx = product if dx is None else dx + product
    assert dx is not None, "there is a matrix"
    return dx, None


linears.defvjp(_linears_forward, _linears_backward)


# --- Files --------------------------------------------------------------------------------------------------

_PARTS = ("codes", "absmax", "nested", "offset")


def to_arrays(tensor: QuantizedTensor, name: str) -> dict[str, np.ndarray]:
    """The parts as numpy arrays named "NAME.KIND.PART" ("…q_proj.weight.nf4.codes")."""
    parts = {part: getattr(tensor, part) for part in _PARTS}
    return {
        f"{name}.{tensor.kind}.{part}": np.asarray(array)
        for part, array in parts.items()
        if array is not None
    }


def from_arrays(arrays: Mapping[str, np.ndarray], name: str) -> QuantizedTensor:
    """What `to_arrays` wrote, bit for bit.

    Raises:
        KeyError: No quantized tensor of that name.
    """
    for kind in get_args(Kind):
        if f"{name}.{kind}.codes" in arrays:
            found = {part: arrays.get(f"{name}.{kind}.{part}") for part in _PARTS}
            parts = {part: None if array is None else jnp.asarray(array) for part, array in found.items()}
            return QuantizedTensor(**cast(dict[str, Any], parts), kind=kind)
    raise KeyError(f"no quantized tensor named {name!r}")
