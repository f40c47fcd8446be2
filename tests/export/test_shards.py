"""Safetensors written by us, read by the safetensors library."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from keras_gemma_ft.export.shards import TensorSpec, write_file, write_sharded

SPECS = [
    TensorSpec("model.embed_tokens.weight", (10, 4), "bfloat16"),
    TensorSpec("model.layers.0.layer_scalar", (1,), "float32"),
    TensorSpec("model.layers.0.mlp.up_proj.weight", (6, 4), "float16"),
    TensorSpec("model.norm.weight", (4,), "float32"),
]


def _values(spec: TensorSpec) -> np.ndarray:
    return np.random.default_rng(len(spec.name)).normal(size=spec.shape).astype(np.float32)


def test_one_file_reads_back(tmp_path):
    assert write_sharded(tmp_path, SPECS, _values) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == {spec.name for spec in SPECS}
    for spec in SPECS:
        expected = _values(spec).astype(getattr(ml_dtypes, spec.dtype, spec.dtype))
        np.testing.assert_array_equal(read[spec.name], expected)
        assert read[spec.name].dtype == expected.dtype


def test_shards_and_index(tmp_path):
    files = write_sharded(tmp_path, SPECS, _values, max_shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["metadata"]["total_size"] == 80 + 4 + 48 + 16
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert list(index["weight_map"]) == [spec.name for spec in SPECS]


def test_no_two_tensors_are_held_at_once(tmp_path):
    import gc
    import weakref

    alive: list[weakref.ref] = []

    def load(spec: TensorSpec) -> np.ndarray:
        gc.collect()
        # The writer may still hold the tensor before this one while it asks for the next.
        assert sum(reference() is not None for reference in alive) <= 1
        value = _values(spec)
        alive.append(weakref.ref(value))
        return value

    write_sharded(tmp_path, SPECS, load)
    assert len(alive) == len(SPECS)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (np.zeros((4, 1)), "model.norm.weight has shape (4, 1), not (4,)"),
        (np.array([0, np.nan, 0, 0]), "model.norm.weight holds NaN or infinity"),
        (np.array([0, 0, np.inf, 0]), "model.norm.weight holds NaN or infinity"),
    ],
)
def test_wrong_values_are_errors(tmp_path, value, complaint):
    with pytest.raises(ValueError, match=re.escape(complaint)):
        write_file(tmp_path / "model.safetensors", SPECS[-1:], lambda _: value)
