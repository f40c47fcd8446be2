"""Tables in the host's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpus import pretended_gpu

from keras_gemma_ft.ops import host, nvidia


@pytest.fixture
def table():
    return np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)


def test_rows_are_the_tables_and_lie_on_the_device(table):
    placed = host.place(table)
    ids = jnp.asarray([[3, 49, 0], [3, 3, 7]])
    rows = jax.jit(host.gather_rows)(placed, ids)
    np.testing.assert_array_equal(rows, table[np.asarray(ids)])
    assert (placed.sharding.memory_kind, rows.sharding.memory_kind) == ("pinned_host", "device")


@pytest.mark.parametrize("width", [8, 7 * 256, 2048], ids=["small", "of pieces", "wide"])
def test_a_gpus_own_reading_gives_the_same(width):
    table = np.arange(50 * width, dtype=np.float32).reshape(50, width)
    ids = jnp.asarray([[3, 49, 0], [3, 3, 7]])
    rows = host.read_rows(jnp.asarray(table), ids, interpret=True)
    np.testing.assert_array_equal(rows, table[np.asarray(ids)])


@pytest.mark.parametrize(("capability", "itself"), [(None, False), (7.5, False), (9.0, True)])
def test_who_reads(table, monkeypatch, capability, itself):
    monkeypatch.setattr(nvidia, "compute_capability", lambda: capability)
    monkeypatch.setattr(host, "read_rows", lambda table, ids: "the GPU")
    rows = host.gather_rows(host.place(table), jnp.asarray([3]))
    assert (isinstance(rows, str) and rows == "the GPU") == itself


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_a_gpus_own_reading_lowers_for_it():
    table = jax.ShapeDtypeStruct((262_144, 35 * 256), jnp.bfloat16)
    with pretended_gpu():
        traced = jax.jit(host.read_rows).trace(table, jax.ShapeDtypeStruct((4, 2048), jnp.int32))
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("xla.gpu.triton") == 1


def test_only_a_placed_table_is_held(table):
    held = []
    jax.eval_shape(
        lambda *tables: held.extend(map(host.holds, tables)), host.place(table), jnp.asarray(table)
    )
    assert held == [True, False]


def test_a_device_without_such_memory_says_so(table, monkeypatch):
    class Device:
        device_kind = "abacus"

        def addressable_memories(self):
            return [type("Memory", (), {"kind": "device"})]

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    with pytest.raises(NotImplementedError, match="abacus reads no memory of the host, only device"):
        host.place(table)
