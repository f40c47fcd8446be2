"""One parity suite over the rungs of attention, on CPU: kernels run interpreted, and are lowered for real."""

from functools import cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import pretended_gpu

from keras_gemma_ft.ops import (
    attention_blocks,
    attention_cudnn,
    attention_pallas,
    attention_reference,
    attention_splash,
    attention_xla,
)
from keras_gemma_ft.ops.attention import RUNGS, attention, choose, decode_attention
from keras_gemma_ft.ops.attention_mask import RESIDUALS, may_attend
from keras_gemma_ft.ops.attention_pallas import Tiling, Tuning

# Blocks of unequal sizes, none of which divides the length; dk and dv in kernels of their own.
APART = Tuning(Tiling(32, 16), Tiling(16, 32), (Tiling(16, 32), Tiling(32, 16)))
CANDIDATES = {
    "xla": attention_xla.attention,
    "pallas": partial(attention_pallas.attention, interpret=True),
    "pallas apart": partial(attention_pallas.attention, interpret=True, tuning=APART),
}
# Relative errors of the whole, against the reference in float32 on the same numbers. float32: sums of at most
# 77·32 terms, each rounded by 2^-24, in quadrature, after a softmax that amplifies the logits' error (|q·k|
# up to 10) by that much: 1e-5. bfloat16: weights, their gradients and the result are each rounded by at most
# 2^-9; three of these in quadrature are 3.4e-3. A wrong mask changes a row by a key's share of it, 1/77 or
# more.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}
WORST_ROW = 10  # a row may be this much worse than the whole


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    d_out: jax.Array
    segment_ids: jax.Array


def packed(length: int) -> np.ndarray:
    """Odd examples then padding; one example; padding between examples and at both ends; only padding."""
    segments = np.zeros((4, length), np.int32)
    segments[0, :13], segments[0, 13:38], segments[0, 38 : length - 6] = 1, 2, 3
    segments[1] = 1
    segments[2, 3:20], segments[2, 27 : length - 11] = 7, 4
    return segments


@cache
def inputs(heads: int, key_heads: int, dim: int, length: int = 77, dtype: str = "float32") -> Inputs:
    rng = np.random.default_rng(0)

    def draw(count: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal((4, length, count, dim)), dtype)

    q, k, v, d_out = draw(heads, 2 * dim**-0.5), draw(key_heads), draw(key_heads), draw(heads)
    return Inputs(q, k, v, d_out, jnp.asarray(packed(length)))


# Most of this suite's time is the compiler's.
HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def values_and_gradients(rung, given: Inputs, window: int | None) -> tuple[jax.Array, ...]:
    @partial(jax.jit, compiler_options=HASTY)
    def run(q, k, v, d_out):
        out, pull = jax.vjp(
            lambda q, k, v: rung(q, k, v, segment_ids=given.segment_ids, window=window), q, k, v
        )
        return out, *pull(d_out)

    return run(*given[:4])


@cache
def reference(
    window: int | None, heads: int, key_heads: int, dim: int, length: int = 77, dtype: str = "float32"
) -> tuple[jax.Array, ...]:
    given = inputs(heads, key_heads, dim, length, dtype)
    wide = Inputs(*(array.astype(jnp.float32) for array in given[:4]), given.segment_ids)
    return values_and_gradients(attention_reference.attention, wide, window)


def assert_close(found, expected, dtype: str) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        row = np.linalg.norm(a - b, axis=-1)
        typical = np.sqrt(np.mean(np.linalg.norm(b, axis=-1) ** 2))
        assert np.sqrt(np.mean(row**2)) < TOLERANCE[dtype] * typical, name
        assert row.max() < WORST_ROW * TOLERANCE[dtype] * typical, f"{name}: one row"


# --- Parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 2, 16, 29, 200])
@pytest.mark.parametrize("rung", ["xla", "pallas"])
def test_rungs_equal_the_reference(rung, window):
    given = inputs(4, 2, 16)  # E4B's ratio of heads
    found = values_and_gradients(CANDIDATES[rung], given, window)
    assert_close(found, reference(window, 4, 2, 16), "float32")


@pytest.mark.parametrize(
    ("rung", "window"), [("xla", None), ("xla", 29), ("pallas", None), ("pallas apart", 29)]
)
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(8, 1, 32), (4, 4, 16)])
def test_rungs_equal_the_reference_at_other_ratios_of_heads(rung, window, heads, key_heads, dim):
    given = inputs(heads, key_heads, dim)
    found = values_and_gradients(CANDIDATES[rung], given, window)
    assert_close(found, reference(window, heads, key_heads, dim), "float32")


@pytest.mark.parametrize("window", [None, 29])
@pytest.mark.parametrize("rung", ["xla", "pallas"])
def test_rungs_equal_the_reference_in_bfloat16(rung, window):
    given = inputs(4, 4, 32, dtype="bfloat16")
    found = values_and_gradients(CANDIDATES[rung], given, window)
    assert {array.dtype for array in found} == {jnp.dtype("bfloat16")}
    assert_close(found, reference(window, 4, 4, 32, dtype="bfloat16"), "bfloat16")


@pytest.mark.parametrize("window", [None, 100])
def test_splash_equals_the_reference(window):
    given = inputs(4, 2, 128, length=150)  # its blocks are 128 wide, so is its smallest head dim
    splash = partial(attention_splash.attention, interpret=True)
    found = values_and_gradients(splash, given, window)
    assert_close(found, reference(window, 4, 2, 128, length=150), "float32")


def wider_window(q, k, v, *, segment_ids, window):
    return attention_reference.attention(q, k, v, segment_ids=segment_ids, window=window + 1)


def one_segment(q, k, v, *, segment_ids, window):
    return attention_reference.attention(q, k, v, segment_ids=jnp.sign(segment_ids), window=window)


def next_key_head(q, k, v, *, segment_ids, window):
    k, v = (jnp.roll(array, 1, axis=2) for array in (k, v))
    return attention_reference.attention(q, k, v, segment_ids=segment_ids, window=window)


def visible_padding(q, k, v, *, segment_ids, window):
    return attention_reference.attention(q, k, v, segment_ids=segment_ids + 1, window=window)


def sees_later(q, k, v, *, segment_ids, window):
    index = jnp.arange(q.shape[1])
    visible = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (segment_ids != 0)[:, :, None]
    return attention_reference.masked_attention(
        q, k, v, visible & (abs(index[:, None] - index[None, :]) < window)
    )


@pytest.mark.parametrize("wrong", [wider_window, one_segment, next_key_head, visible_padding, sees_later])
def test_parity_can_fail(wrong):
    given = inputs(4, 2, 16, dtype="bfloat16")
    found = values_and_gradients(wrong, given, 29)
    with pytest.raises(AssertionError):
        assert_close(found, reference(29, 4, 2, 16, dtype="bfloat16"), "bfloat16")


# --- The definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 5])
def test_the_reference_is_softmax_token_by_token(window):
    given = inputs(4, 2, 16, length=50)
    q, k, v = (np.asarray(array, np.float64) for array in given[:3])
    segments = np.asarray(given.segment_ids)
    expected = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        seen = [
            s
            for s in range(t + 1)
            if segments[b, s] == segments[b, t] != 0 and (window is None or t - s < window)
        ]
        if seen:
            weights = np.exp(k[b, seen, h // 2] @ q[b, t, h])
            expected[b, t, h] = weights / weights.sum() @ v[b, seen, h // 2]
    found = attention(*given[:3], segment_ids=given.segment_ids, window=window, implementation="reference")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    from jax.test_util import check_grads

    q, k, v, _, segments = inputs(2, 1, 16, length=50)
    rung = jax.jit(partial(attention_reference.attention, segment_ids=segments, window=5))
    check_grads(rung, (q, k, v), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_a_window_counts_as_in_transformers():
    masking = pytest.importorskip("transformers.masking_utils")
    theirs = masking.sliding_window_causal_mask_function(5)
    torch = pytest.importorskip("torch")
    index = np.arange(12)
    ours = may_attend(index[:, None], index[None, :], np.ones((12, 1)), np.ones((1, 12)), 5)
    places = torch.arange(12)
    assert ours.tolist() == theirs(0, 0, places[:, None], places[None, :]).tolist()


@pytest.mark.parametrize("rung", ["xla", "pallas"])
def test_a_packed_row_is_its_examples_apart(rung):
    given = inputs(4, 2, 16)
    together = values_and_gradients(CANDIDATES[rung], given, 16)
    second = np.flatnonzero(np.asarray(given.segment_ids[0]) == 2)
    alone = jax.tree.map(lambda array: array[:1, second], given)
    for a, b in zip(together, values_and_gradients(CANDIDATES[rung], alone, 16), strict=True):
        np.testing.assert_allclose(a[:1, second], b, atol=2e-5)


@pytest.mark.parametrize("rung", ["reference", "xla", "pallas"])
def test_padding_gives_zeros_whatever_it_holds_and_receives(rung):
    given = inputs(4, 2, 16)
    padding = given.segment_ids == 0
    loud = given._replace(
        **{
            name: jnp.where(padding[:, :, None, None], 1e4, array)
            for name, array in given._asdict().items()
            if name != "segment_ids"
        }
    )
    function = {"reference": attention_reference.attention, **CANDIDATES}[rung]
    found = values_and_gradients(function, loud, 16)
    for array in found:
        assert np.all(np.isfinite(array))
        assert not np.any(np.asarray(array)[np.asarray(padding)])
    assert_close(found, reference(16, 4, 2, 16), "float32")


def test_decoding_gives_the_last_row_of_attention():
    q, k, v, _, segments = inputs(4, 2, 16)
    full = reference(16, 4, 2, 16)[0]
    index = jnp.arange(q.shape[1])
    for position in (5, 30, 76):
        here = slice(position, position + 1)
        seen = may_attend(position, index[None, :], segments[:, here], segments, window=16)
        seen &= index != position  # the token's own entry is not in the cache yet
        cached = (jnp.where(seen[:, None, :, None], x.swapaxes(1, 2), 1e4) for x in (k, v))
        one = jax.jit(decode_attention)(q[:, here], k[:, here], v[:, here], *cached, seen)
        real = segments[:, position] != 0
        np.testing.assert_allclose(one[real], full[real, here], atol=1e-5)


# --- Memory and work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rung", "window", "growth"), [("xla", None, 4), ("xla", 64, 4), ("reference", None, 16)]
)
def test_memory_of_the_xla_rung_is_linear_in_the_length(rung, window, growth):
    def temporary_bytes(length: int) -> int:
        def loss(q, k, v, segment_ids):
            out = RUNGS[rung](q, k, v, segment_ids=segment_ids, window=window)
            return out.astype(jnp.float32).sum()

        wide = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
        narrow = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
        segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(wide, narrow, narrow, segments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Four times the length, where the part that does not grow is small beside the rest.
    assert temporary_bytes(4096) / temporary_bytes(1024) == pytest.approx(growth, rel=0.25)


@pytest.mark.parametrize("window", [None, 1, 16, 29])
def test_kernels_visit_the_blocks_that_see_something_and_no_others(window):
    segments = packed(77)
    segments[2, :] = np.arange(77) // 3 % 2 + 1  # examples in turns: an interval must cover them all
    index = np.arange(77)
    visible = np.asarray(
        may_attend(index[:, None], index[None, :], segments[:, :, None], segments[:, None, :], window)
    )
    blocks = np.pad(visible, ((0, 0), (0, 96 - 77), (0, 80 - 77))).reshape(4, 3, 32, 5, 16).any((2, 4))
    for visited, axis in (
        (attention_blocks.visited_keys, 2),
        (attention_blocks.visited_queries, 1),
    ):
        first, end = (np.asarray(array) for array in visited(jnp.asarray(segments), 32, 16, window))
        some = blocks.any(axis)
        count = blocks.shape[axis]
        np.testing.assert_array_equal(end > first, some)
        np.testing.assert_array_equal(first[some], blocks.argmax(axis)[some])
        np.testing.assert_array_equal(end[some], count - np.flip(blocks, axis).argmax(axis)[some])


def test_remat_that_saves_the_residuals_does_not_run_the_forward_kernel_again():
    given = inputs(4, 2, 16)
    rung = partial(CANDIDATES["pallas"], segment_ids=given.segment_ids, window=None)

    def runs_again(policy) -> bool:
        layer = jax.checkpoint(lambda q, k, v: rung(jnp.sin(q), k, v).sum(), policy=policy)
        program = jax.jit(jax.grad(layer, argnums=(0, 1, 2))).lower(*given[:3]).compile().as_text()
        assert "attention_forward" in program
        return "rematted_computation/attention_forward" in program

    assert not runs_again(jax.checkpoint_policies.save_only_these_names(RESIDUALS))
    assert runs_again(jax.checkpoint_policies.nothing_saveable)


def test_remat_that_saves_the_residuals_does_not_run_cudnn_again(monkeypatch):
    """Traced only: what jax asks of the machine while it traces is answered for it."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    given = inputs(4, 2, 16, length=78, dtype="bfloat16")
    rung = partial(attention_cudnn.attention, segment_ids=given.segment_ids, window=16)

    def runs(policy) -> int:
        layer = jax.checkpoint(
            lambda q, k, v: rung(jnp.sin(q), k, v).astype(jnp.float32).sum(), policy=policy
        )
        program = str(jax.make_jaxpr(jax.grad(layer, argnums=(0, 1, 2)))(*given[:3]))
        return program.count("dot_product_attention_fwd")

    assert runs(jax.checkpoint_policies.save_only_these_names(RESIDUALS)) == 1
    assert runs(jax.checkpoint_policies.nothing_saveable) == 2


@pytest.mark.parametrize("rung", ["xla", "pallas", "splash"])
def test_remat_that_saves_the_residuals_saves_the_output_once(rung):
    run = {**CANDIDATES, "splash": partial(attention_splash.attention, interpret=True)}[rung]
    segments = jnp.ones((2, 256), jnp.int32)
    wide, narrow = (jax.ShapeDtypeStruct((2, 256, heads, 128), "bfloat16") for heads in (4, 2))

    def kept(q, k, v):
        layer = jax.checkpoint(
            lambda q, k, v: jnp.square(run(jnp.sin(q), k, v, segment_ids=segments, window=64)),
            policy=jax.checkpoint_policies.save_only_these_names(RESIDUALS),
        )
        return jax.vjp(layer, q, k, v)[1]

    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(kept, wide, narrow, narrow))]
    assert sizes.count(wide.size) == 2, "q and the output"


def test_the_cudnn_rung_hands_on_values_and_gradients(monkeypatch):
    """With jax's plain implementation in place of the library's kernel."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *arrays, implementation, **how: plain(*arrays, **how, implementation="xla"),
    )
    given = inputs(4, 2, 16, length=78, dtype="bfloat16")
    found = values_and_gradients(attention_cudnn.attention, given, 16)
    assert_close(found, reference(16, 4, 2, 16, length=78, dtype="bfloat16"), "bfloat16")


# --- The ladder ---------------------------------------------------------------------------------------------


def shapes(heads: int, key_heads: int, dim: int, length: int = 2048, dtype="bfloat16"):
    wide = jax.ShapeDtypeStruct((4, length, heads, dim), dtype)
    return wide, jax.ShapeDtypeStruct((4, length, key_heads, dim), dtype)


def test_a_cpu_takes_the_xla_rung():
    assert choose(*shapes(8, 2, 256), window=512) == ("xla", {})


def pretend_device(monkeypatch, **attributes):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(**attributes)])


@pytest.mark.parametrize("dim", [256, 512])
def test_a_gpu_takes_pallas(monkeypatch, dim):
    pretend_device(monkeypatch, compute_capability="9.0")
    assert choose(*shapes(8, 2, dim), window=None) == ("pallas", {})


def test_a_gpu_without_pallas_takes_cudnn_where_it_can(monkeypatch):
    pretend_device(monkeypatch, compute_capability="9.0")
    monkeypatch.setattr(attention_pallas, "plgpu", None)
    monkeypatch.setattr(attention_cudnn, "_fused", lambda window, q, *rest: q)
    name, declined = choose(*shapes(8, 2, 256), window=512)
    assert (name, declined) == ("cudnn", {"pallas": "this JAX has no Triton backend for Pallas"})
    name, declined = choose(*shapes(8, 2, 512), window=None)
    assert (name, declined["cudnn"]) == ("xla", "head dim must be a multiple of 8 up to 256, got 512")
    _, declined = choose(*shapes(8, 2, 256, length=16384), window=512)
    assert "too much memory" in declined["cudnn"]


def test_a_gpu_takes_neither_for_float32(monkeypatch):
    pretend_device(monkeypatch, compute_capability="9.0")
    name, declined = choose(*shapes(8, 2, 512, dtype="float32"), window=None)
    assert name == "xla"
    assert declined["pallas"] == "needs bfloat16 or float16, got float32, float32 and float32"


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_other_gpus_take_the_xla_rung(monkeypatch, capability):
    pretend_device(monkeypatch, compute_capability=capability, device_kind="another GPU")
    name, declined = choose(*shapes(8, 2, 512), window=None)
    assert name == "xla"
    assert declined["pallas"].endswith("compute capability 8.0 or more, this is another GPU")


def test_gpus_with_less_shared_memory_get_smaller_blocks(monkeypatch):
    seen = []
    monkeypatch.setattr(attention_pallas, "flash_attention", lambda _, tuning, *rest: seen.append(tuning))
    given = jnp.zeros((1, 8, 1, 512), jnp.bfloat16)
    for capability in ("9.0", "8.9"):
        pretend_device(monkeypatch, compute_capability=capability)
        attention_pallas.attention(given, given, given, segment_ids=jnp.ones((1, 8), int), window=None)
    assert seen == [attention_pallas.TUNING[512], attention_pallas.MODEST_TUNING[512]]


def test_a_rung_asked_for_by_name_says_why_it_declines():
    with pytest.raises(NotImplementedError, match=r"pallas declines: needs an NVIDIA GPU .* this is cpu"):
        choose(*shapes(8, 2, 512), window=None, implementation="pallas")
    with pytest.raises(NotImplementedError, match="splash declines: needs a TPU, this is cpu"):
        choose(*shapes(8, 2, 512), window=None, implementation="splash")


def test_an_error_of_a_rung_is_not_a_decline(monkeypatch):
    def broken(*_, **__):
        raise TypeError("a bug")

    monkeypatch.setitem(RUNGS, "xla", broken)
    with pytest.raises(TypeError, match="a bug"):
        choose(*shapes(8, 2, 256), window=512)


def test_arguments_that_do_not_fit_are_refused():
    q, k, v, _, segments = inputs(4, 2, 16)
    with pytest.raises(ValueError, match="implementation must be one of reference, xla"):
        attention(q, k, v, segment_ids=segments, window=None, implementation="flash")
    with pytest.raises(ValueError, match="do not fit together"):
        attention(q, k, v, segment_ids=segments[:, 1:], window=None)
    with pytest.raises(ValueError, match="multiple"):
        attention(q[:, :, :3], k, v, segment_ids=segments, window=None)


# --- Lowering for machines that are not here ----------------------------------------------------------------


def lowered(rung, platform: str, heads: int, key_heads: int, dim: int) -> str:
    wide, narrow = shapes(heads, key_heads, dim)
    segments = jax.ShapeDtypeStruct((4, 2048), jnp.int32)

    def run(q, k, v, d_out, segment_ids):
        out, pull = jax.vjp(lambda q, k, v: rung(q, k, v, segment_ids), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run).trace(wide, narrow, narrow, wide, segments).lower(
        lowering_platforms=(platform,)
    ).as_text()  # fmt: skip


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("dim", "window", "kernels"),
    [(256, 512, ["forward", "dq", "dk", "dv"]), (512, None, ["forward", "dq", "dk", "dv"])],
)
def test_the_triton_kernels_lower_for_cuda(dim, window, kernels):
    rung = partial(attention_pallas.flash_attention, window, attention_pallas.TUNING[dim], False)
    with pretended_gpu():
        text = lowered(rung, "cuda", 8, 2, dim)
    assert text.count("xla.gpu.triton") == len(kernels)
    for kernel in kernels:
        assert f'"attention_{kernel}"' in text


@pytest.mark.parametrize(("dim", "window"), [(256, 512), (512, None)])
def test_splash_lowers_for_tpu(dim, window):
    text = lowered(partial(attention_splash.splash_attention, window, False), "tpu", 8, 2, dim)
    assert text.count("tpu_custom_call") == 3  # forward, dq, and dk with dv
