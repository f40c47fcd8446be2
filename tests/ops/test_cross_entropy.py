"""The vocabulary loss: values and gradients against float64, what runs, and what memory it takes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_gemma_ft.ops import cross_entropy
from keras_gemma_ft.ops.cross_entropy import cross_entropy_sum, reference, scores
from keras_gemma_ft.ops.quantize import Kind, dequantize, quantize

N, V, D = 37, 100, 64
CHUNK = 8
MASKS = {
    "full": np.ones(N, bool),
    "sparse": np.random.default_rng(5).random(N) < 0.3,
    "last": np.arange(N) == N - 1,
    "empty": np.zeros(N, bool),
}


def problem(dtype: Any, scale: float = 0.7) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden, embedding and targets (with repetitions, the first and the last row included)."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(N, D)), dtype)
    embedding = jnp.asarray(rng.normal(size=(V, D)), dtype)
    targets = rng.integers(0, V, N)
    targets[:3] = 0, V - 1, V - 1
    return hidden, embedding, jnp.asarray(targets, jnp.int32)


class Exact:
    """The loss and its gradients in float64, and how far rounding may take the gradients from them."""

    def __init__(self, hidden: Any, embedding: Any, targets: Any, mask: np.ndarray, soft_cap: float | None):
        hidden, embedding = np.asarray(hidden, np.float64), np.asarray(embedding, np.float64)
        logits = hidden @ embedding.T
        slope = np.ones_like(logits)
        if soft_cap is not None:
            slope = 1 - np.tanh(logits / soft_cap) ** 2
            logits = soft_cap * np.tanh(logits / soft_cap)
        top = logits.max(axis=1, keepdims=True)
        log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))
        row = np.arange(len(hidden))
        self.loss = ((log_sum - logits[row, targets]) * mask).sum()
        d_logits = np.exp(logits - log_sum[:, None])
        d_logits[row, targets] -= 1
        d_logits *= slope * mask[:, None]
        self.d_hidden, self.d_embedding = d_logits @ embedding, d_logits.T @ hidden
        # The sums of magnitudes that rounding errors are relative to.
        self.size_hidden = abs(d_logits) @ abs(embedding)
        self.size_embedding = abs(d_logits).T @ abs(hidden)

    def compare(self, loss: Any, d_hidden: jax.Array, d_embedding: jax.Array | None = None) -> None:
        """bfloat16 rounds each weight once and the result once, 2⁻⁸ each; float32 errs in the logits."""
        np.testing.assert_allclose(loss, self.loss, rtol=2e-6, atol=1e-5)
        close(d_hidden, self.d_hidden, self.size_hidden)
        if d_embedding is not None:
            close(d_embedding, self.d_embedding, self.size_embedding)


def close(value: jax.Array, exact: np.ndarray, size: np.ndarray) -> None:
    bound = 2**-7 if value.dtype == jnp.bfloat16 else 2e-5
    assert np.all(abs(np.asarray(value, np.float64) - exact) <= bound * size)


# Most of these tests' time is the compiler's.
HASTY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@partial(jax.jit, static_argnames=("soft_cap", "train", "block_rows"), compiler_options=HASTY)
def run(
    hidden: jax.Array,
    embedding: Any,
    targets: jax.Array,
    mask: jax.Array,
    *,
    soft_cap: float | None = 30.0,
    train: bool = False,
    block_rows: int = 32,
) -> Any:
    """((loss, tokens), gradients); with `train`, those of hidden and of the embedding."""

    def loss(hidden: jax.Array, embedding: Any) -> tuple[jax.Array, jax.Array]:
        return cross_entropy_sum(
            hidden, embedding, targets, mask, soft_cap=soft_cap,
            train_embedding=train, chunk_tokens=CHUNK, block_rows=block_rows,
        )  # fmt: skip

    return jax.value_and_grad(loss, (0, 1) if train else 0, has_aux=True)(hidden, embedding)


@pytest.mark.parametrize("block_rows", [32, V])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(dtype: Any, mask: str, block_rows: int) -> None:
    hidden, embedding, targets = problem(dtype)
    (loss, tokens), d_hidden = run(hidden, embedding, targets, MASKS[mask], block_rows=block_rows)
    assert (loss.dtype, tokens.dtype, d_hidden.dtype) == (jnp.float32, jnp.int32, dtype)
    assert tokens == MASKS[mask].sum()
    Exact(hidden, embedding, targets, MASKS[mask], 30.0).compare(loss, d_hidden)
    assert not np.any(np.asarray(d_hidden)[~MASKS[mask]])


@pytest.mark.parametrize("soft_cap", [30.0, 2 * cross_entropy.LARGEST_BOUND, None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("mask", ["sparse", "empty"])
def test_a_trained_table_and_other_soft_caps(dtype: Any, soft_cap: float | None, mask: str) -> None:
    hidden, embedding, targets = problem(dtype)
    (loss, _), gradients = run(hidden, embedding, targets, MASKS[mask], soft_cap=soft_cap, train=True)
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    Exact(hidden, embedding, targets, MASKS[mask], soft_cap).compare(loss, *gradients)


def test_the_plain_reference_is_the_definition() -> None:
    hidden, embedding, targets = problem(jnp.float32)
    mask = MASKS["sparse"]
    loss, d_hidden = jax.value_and_grad(reference)(hidden, embedding, targets, jnp.asarray(mask), 30.0)
    Exact(hidden, embedding, targets, mask, 30.0).compare(loss, d_hidden)


@pytest.mark.parametrize(
    ("kind", "double", "dtype"),
    [("nf4", True, jnp.bfloat16), ("nf4", False, jnp.float32), ("int8", True, jnp.bfloat16)],
)
def test_quantized_tables(kind: Kind, double: bool, dtype: Any) -> None:
    hidden, embedding, targets = problem(dtype)
    table = quantize(embedding, kind, double)
    (loss, _), d_hidden = run(hidden, table, targets, MASKS["sparse"])
    Exact(hidden, dequantize(table, dtype), targets, MASKS["sparse"], 30.0).compare(loss, d_hidden)


def test_a_float32_table_is_multiplied_in_the_dtype_of_hidden() -> None:
    hidden, _, targets = problem(jnp.bfloat16)
    _, embedding, _ = problem(jnp.float32)
    (loss, _), (d_hidden, d_embedding) = run(hidden, embedding, targets, MASKS["full"], train=True)
    assert d_embedding.dtype == jnp.float32
    exact = Exact(hidden, embedding.astype(jnp.bfloat16), targets, MASKS["full"], 30.0)
    exact.compare(loss, d_hidden, d_embedding.astype(jnp.bfloat16))


@pytest.mark.parametrize("soft_cap", [30.0, None])
def test_a_confident_token_keeps_its_digits(soft_cap: float | None) -> None:
    """At p = 1 − 3e-5, p in bfloat16 is 1; the loss and the gradient must be right nevertheless."""
    embedding = jnp.eye(4, D, dtype=jnp.bfloat16)
    hidden = 11.5 * embedding[:1]
    targets, mask = jnp.zeros(1, jnp.int32), np.ones(1, bool)
    exact = Exact(hidden, embedding, targets, mask, soft_cap)
    assert 1e-5 < exact.loss < 1e-4
    (loss, _), d_hidden = run(hidden, embedding, targets, mask, soft_cap=soft_cap)
    np.testing.assert_allclose(loss, exact.loss, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(d_hidden, np.float64), exact.d_hidden, rtol=2**-7)


def test_saturated_logits_stay_finite() -> None:
    hidden, embedding, targets = problem(jnp.bfloat16, scale=1000)
    for soft_cap in (cross_entropy.LARGEST_BOUND, None):
        exact = Exact(hidden, embedding, targets, MASKS["full"], soft_cap)
        (loss, _), d_hidden = run(hidden, embedding, targets, MASKS["full"], soft_cap=soft_cap)
        np.testing.assert_allclose(loss, exact.loss, rtol=1e-5)
        assert jnp.all(jnp.isfinite(d_hidden))


def test_masked_tokens_do_not_matter() -> None:
    hidden, embedding, targets = problem(jnp.float32)
    mask = MASKS["sparse"]
    expected = run(hidden, embedding, targets, mask, train=True)
    hidden = jnp.where(mask[:, None], hidden, jnp.nan)
    targets = jnp.where(mask, targets, -100)
    found = run(hidden, embedding, targets, mask, train=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("supervised", [0, 1, CHUNK, CHUNK + 1, N])
def test_only_the_chunks_of_supervised_tokens_run(supervised: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    chunk = cross_entropy._chunk

    def counting(*arguments: Any) -> Any:
        jax.debug.callback(lambda: ran.append(1))
        return chunk(*arguments)

    monkeypatch.setattr(cross_entropy, "_chunk", counting)
    mask = np.isin(np.arange(N), np.random.default_rng(1).permutation(N)[:supervised])
    jax.block_until_ready(run.__wrapped__(*problem(jnp.float32), mask))
    jax.effects_barrier()
    assert len(ran) == -(-supervised // CHUNK)


def test_micro_batches_under_scan_and_remat_equal_one_batch() -> None:
    """A scan over two micro-batches of a rematerialized model, with the sum scaled: as in a training step."""
    hidden, embedding, targets = problem(jnp.float32)
    mask = MASKS["sparse"]
    weight = jnp.asarray(np.random.default_rng(3).normal(size=(D, D)) / 8, jnp.float32)

    def split(array: Any) -> jax.Array:
        return jnp.pad(jnp.asarray(array), ((0, 1),) + ((0, 0),) * (array.ndim - 1)).reshape(
            2, -1, *array.shape[1:]
        )

    def loss_of(weight: jax.Array, hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        out = jnp.tanh(hidden @ weight)
        total, _ = cross_entropy_sum(out, embedding, targets, mask, soft_cap=30.0, chunk_tokens=CHUNK)
        return 0.125 * total

    @jax.jit
    def scanned(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        def micro_batch(carry: Any, batch: Any) -> Any:
            return jax.tree.map(
                jnp.add, carry, jax.value_and_grad(jax.checkpoint(loss_of))(weight, *batch)
            ), None

        start = (jnp.zeros(()), jnp.zeros_like(weight))
        return jax.lax.scan(micro_batch, start, (split(hidden), split(targets), split(mask)))[0]

    def plain(weight: jax.Array) -> jax.Array:
        return 0.125 * reference(jnp.tanh(hidden @ weight), embedding, targets, jnp.asarray(mask), 30.0)

    expected = jax.value_and_grad(plain)(weight)
    for found, right in zip(scanned(weight), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
    through_scan = jax.grad(
        lambda weight: jnp.sum(
            jax.lax.map(lambda batch: loss_of(weight, *batch), (split(hidden), split(targets), split(mask)))
        )
    )(weight)
    np.testing.assert_allclose(through_scan, expected[1], rtol=1e-5, atol=1e-5)


def test_shards_of_tokens_add_up() -> None:
    hidden, embedding, targets = problem(jnp.float32)
    hidden, targets = hidden[:36], targets[:36]
    mask = jnp.asarray(MASKS["sparse"][:36])
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    @partial(
        jax.shard_map, mesh=mesh, in_specs=(split, whole, split, split), out_specs=whole, check_vma=False
    )
    def sums(*shard: jax.Array) -> Any:
        return jax.lax.psum(cross_entropy_sum(*shard, soft_cap=30.0, chunk_tokens=CHUNK), "data")

    def mean(hidden: jax.Array) -> jax.Array:
        total, tokens = sums(hidden, embedding, targets, mask)
        return total / tokens

    loss, d_hidden = jax.jit(jax.value_and_grad(mean), compiler_options=HASTY)(hidden)
    exact = Exact(hidden, embedding, targets, np.asarray(mask), 30.0)
    count = int(mask.sum())
    exact.compare(loss * count, d_hidden * count)


def test_a_loss_alone_equals_the_loss_of_a_training_step() -> None:
    arguments = (*problem(jnp.bfloat16), jnp.asarray(MASKS["sparse"]))
    alone = cross_entropy_sum(*arguments, soft_cap=30.0, chunk_tokens=CHUNK, block_rows=32)
    assert alone == run(*arguments)[0]


def test_what_does_not_fit_is_refused() -> None:
    hidden, embedding, targets = problem(jnp.float32)
    mask = jnp.ones(N, bool)
    with pytest.raises(ValueError, match="do not fit together"):
        cross_entropy_sum(hidden, embedding[:, :8], targets, mask, soft_cap=30.0)
    with pytest.raises(ValueError, match="do not fit together"):
        cross_entropy_sum(hidden, embedding, targets[:-1], mask, soft_cap=30.0)
    with pytest.raises(ValueError, match="needs an array"):
        cross_entropy_sum(hidden, quantize(embedding), targets, mask, soft_cap=30.0, train_embedding=True)
    with pytest.raises(ValueError, match="NF4's blocks of 64"):
        cross_entropy_sum(
            hidden[:, :32], quantize(embedding[:, :32]), targets, mask, soft_cap=30.0, block_rows=31
        )


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "nf4", "int8"])
def test_temporaries_of_gemma_stay_below_half_a_gibibyte(stored: str) -> None:
    """8,192 tokens and E4B's table, compiled only. The table alone would be 1.25 GiB in bfloat16."""
    vocabulary, width, tokens = 262_144, 2560, 8192
    table: Any = jax.ShapeDtypeStruct(
        (vocabulary, width), jnp.float32 if stored == "float32" else jnp.bfloat16
    )
    if stored in ("nf4", "int8"):
        table = jax.eval_shape(lambda weight: quantize(weight, stored), table)  # type: ignore[arg-type]

    def loss(hidden: jax.Array, table: Any, targets: jax.Array, mask: jax.Array) -> jax.Array:
        return cross_entropy_sum(hidden, table, targets, mask, soft_cap=30.0)[0]

    shapes = (
        jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16),
        table,
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
        jax.ShapeDtypeStruct((tokens,), bool),
    )
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29


@pytest.mark.parametrize("kind", ["nf4", "int8", None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_scores_of_a_quantized_table_in_blocks_are_those_of_the_whole_one(kind, dtype):
    """100 rows in blocks of 32: the last block reaches back."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(100, 64)), dtype)
    hidden = jnp.asarray(rng.normal(size=(2, 3, 64)), dtype)
    stored = table if kind is None else quantize(table, kind)
    whole = table if kind is None else dequantize(stored, dtype)
    expected = jnp.einsum("btd,vd->btv", hidden, whole, preferred_element_type=jnp.float32)
    found = jax.jit(partial(scores, block_rows=32))(hidden, stored)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_scores_never_have_a_whole_dequantized_table(kind):
    vocabulary, width, rows = 4096, 512, 256
    table = jax.eval_shape(
        partial(quantize, kind=kind), jax.ShapeDtypeStruct((vocabulary, width), "bfloat16")
    )
    hidden = jax.ShapeDtypeStruct((1, width), jnp.bfloat16)
    program = jax.jit(partial(scores, block_rows=rows)).lower(hidden, table).compile()
    assert program.memory_analysis().temp_size_in_bytes < vocabulary * width * 2


@pytest.mark.parametrize(("count", "plan"), [(5, (5, 16_384)), (8191, (1024, 16_384)), (8192, (2048, 8192))])
def test_many_tokens_come_in_longer_chunks_by_smaller_blocks(monkeypatch, count, plan):
    seen = []
    monkeypatch.setattr(cross_entropy, "_cross_entropy_sum", lambda plan, *rest: seen.append(plan))
    hidden, table = jnp.zeros((count, 2)), jnp.zeros((20_000, 2))
    cross_entropy.cross_entropy_sum(
        hidden, table, jnp.zeros(count, int), jnp.ones(count, bool), soft_cap=None
    )
    assert [(plan.chunk_tokens, plan.block_rows) for plan in seen] == [plan]
