"""Dropout whose mask is a hash of the element's index: never stored, made anew in the backward pass.

A random number generator of its own kernel would write four bytes for each element of each adapter's input. A
hash is arithmetic that the compiler fuses into the multiplication.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mix(value: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every output bit depends on every input bit.

    The constants are those of "lowbias32" (Wellons 2018, "Prospecting for hash functions").
    """
    value = value ^ (value >> 16)
    value = value * np.uint32(0x7FEB352D)
    value = value ^ (value >> 15)
    value = value * np.uint32(0x846CA68B)
    return value ^ (value >> 16)


def fold(key: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    """A new key, uint32 [2], from a key and a number (a layer, a place in it, a micro-batch)."""
    number = jnp.asarray(number).astype(jnp.uint32)
    return jnp.stack([mix(key[0] + np.uint32(0x9E3779B9) * (number + 1)), mix(key[1] ^ mix(number))])


def drop(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Sets a share `rate` of the elements to zero.

    Dropout also scales the others by 1 / (1 - rate). That is left to the caller, who can scale something
    smaller that is linear in x, and in a dtype in which the factor is exact enough.

    Args:
        x: [..., D], of fewer than 2^32 rows.
        rate: From 0 up to, not including, 1.
        key: uint32 [2]; the same key gives the same mask.
    """
    rows = jnp.arange(math.prod(x.shape[:-1]), dtype=jnp.uint32).reshape(*x.shape[:-1], 1)
    columns = jnp.arange(x.shape[-1], dtype=jnp.uint32)
    return x * kept(row_hash(rows, key), columns, rate, key).astype(x.dtype)


def row_hash(rows: jax.Array, key: Any) -> jax.Array:
    """What rows, uint32 of any shape, add to the hashes of their elements; `key` holds two uint32."""
    return mix(mix(rows + key[0]) ^ key[1])


def kept(row_hashes: jax.Array, columns: jax.Array, rate: float, key: Any) -> jax.Array:
    """Which elements `drop` keeps, bool; `row_hashes` and columns, uint32, broadcast to their shape."""
    # Nothing in the array's full size may be the same for all layers: what is, even the columns' numbers, a
    # compiler takes out of the loop over layers, stores, and reads again in each of them. So the columns come
    # in one row.
    return mix(columns * (key[1] | np.uint32(1)) + row_hashes) >= np.uint32(rate * 2**32)
