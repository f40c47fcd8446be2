"""The feed-forward network's nonlinearity with its adapters: interpreted kernels against plain operations."""

import logging
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import pretended_gpu

from keras_gemma_ft.ops import gated_gelu, gated_gelu_pallas
from keras_gemma_ft.ops.gated_gelu_pallas import Operands, Tiling

KEY = jnp.array([3, 9], jnp.uint32)
SMALL = (Tiling(16, 32, parts=2), Tiling(32, 16, parts=2))


def arrays(rows: int, tokens: int, width: int, rank: int, dtype: str = "float32"):
    keys = iter(jax.random.split(jax.random.key(0), 7))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    wide = [normal(rows, tokens, width) for _ in range(2)] + [normal(rows, tokens, rank) for _ in range(2)]
    thin = [0.3 * normal(width, rank), 0.3 * normal(width, rank), 0.2 * normal(rank, width)]
    return Operands(*(array.astype(dtype) for array in wide), *thin)


def values_and_gradients(function, given):
    results, pull = jax.vjp(function, given)
    cotangents = [jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape) for out in results]
    return [*results, *pull(tuple(cotangents))[0]]


def assert_same(found, expected, tolerance):
    names = ["product", "low", "gate", "up", "low_gate", "low_up", "b_gate", "b_up", "a_down"]
    for name, one, other in zip(names, found, expected, strict=True):
        distance = jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel())
        assert distance < tolerance, (name, distance)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize(
    ("width", "rank"), [(128, 16), (96, 5), (64, 32)], ids=["even", "three tiles, odd rank", "wide rank"]
)
def test_the_kernels_compute_what_the_operations_do(rate, width, rank):
    given = arrays(2, 32, width, rank)
    kernels = partial(gated_gelu_pallas.adapted, rate=rate, key=KEY, tilings=SMALL, interpret=True)
    plain = partial(gated_gelu.adapted, rate=rate, key=KEY, implementation="xla")
    found, expected = values_and_gradients(kernels, given), values_and_gradients(plain, given)
    assert_same(found, expected, 1e-6)
    if rate:  # else the comparison would not see the mask
        undropped = values_and_gradients(partial(plain, key=None), given)
        assert float(jnp.abs(undropped[1] - expected[1]).max()) > 0.1


def test_it_is_the_three_adapters_around_gelu():
    given = arrays(1, 16, 32, 4)
    product, low = gated_gelu.adapted(given)
    gate, up = given.gate + given.low_gate @ given.b_gate.T, given.up + given.low_up @ given.b_up.T
    wanted = jax.nn.gelu(gate, approximate=True) * up
    np.testing.assert_allclose(product, wanted, atol=2e-5)
    np.testing.assert_allclose(low, wanted @ given.a_down.T, atol=2e-5)


def test_gelu_and_its_slope():
    x = jnp.linspace(-30, 30, 2001)
    gelu = partial(jax.nn.gelu, approximate=True)
    found, share = gated_gelu_pallas.gelu_and_share(x)
    np.testing.assert_allclose(found, gelu(x), atol=2e-6)
    np.testing.assert_allclose(gated_gelu_pallas.gelu_slope(x, share), jax.vmap(jax.grad(gelu))(x), atol=5e-6)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("width", [6144, 12_288, 10_240, 2112, 21_504])
def test_they_lower_for_a_gpu_at_published_widths(width):
    given = jax.eval_shape(partial(arrays, 4, 2048, width, 16, "bfloat16"))

    def total(given):
        return sum(out.astype(jnp.float32).sum() for out in gated_gelu_pallas.adapted(given, 0.05, KEY))

    with pretended_gpu():
        traced = jax.jit(jax.value_and_grad(total)).trace(given)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("xla.gpu.triton") == 2
    assert program.count("output_operand_alias<") == 2  # d_gate and d_up lie where gate and up did
    for way in ("forward", "backward"):
        assert f'"gated_gelu_{way}"' in program


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (arrays(2, 32, 128, 16), "bfloat16 or float16, got float32"),
        (arrays(1, 1, 128, 16, "bfloat16"), "1 tokens of width 128 do not divide"),
        (arrays(2, 32, 80, 16, "bfloat16"), "64 tokens of width 80 do not divide"),
        (arrays(2, 32, 128, 65, "bfloat16"), "rank of at most 64, got 65"),
        (arrays(2, 32, 128, 16, "bfloat16"), "NVIDIA GPU of compute capability 8.0 or more, this is cpu"),
    ],
    ids=["dtype", "tokens", "width", "rank", "device"],
)
def test_what_the_kernels_decline(given, reason, monkeypatch, caplog):
    with pytest.raises(NotImplementedError, match=reason):
        gated_gelu.adapted(given, implementation="pallas")
    # On a GPU the other rung then takes it, and says why, once.
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    caplog.set_level(logging.INFO, gated_gelu.__name__)
    gated_gelu._log_declined.cache_clear()
    for _ in range(2):
        assert gated_gelu.adapted(given)[0].shape == given.gate.shape
    (message,) = caplog.messages
    assert message.startswith("gated_gelu runs on xla; pallas declines")
    assert re.search(reason, message)
