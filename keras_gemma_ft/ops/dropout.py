"""Dropout whose mask is a hash of the element's index: never stored, made anew in the backward pass.

A random number generator of its own kernel would write four bytes for each element of each adapter's input. A
hash is arithmetic that the compiler fuses into the multiplication.
"""

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


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share `rate` of the elements to zero and scales the others by 1 / (1 - rate).

    Args:
        x: Of fewer than 2^32 elements.
        rate: From 0 up to, not including, 1.
        key: uint32 [2]; the same key gives the same mask. None: no dropout.
    """
    if key is None or rate == 0:
        return x
    index = jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape)
    # An odd factor makes the indices of two keys meet in another order; the bijection then scatters them.
    kept = mix(index * (key[1] | 1) + key[0]) >= np.uint32(rate * 2**32)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), jnp.zeros((), x.dtype))
