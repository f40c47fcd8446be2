"""Peak rates by the names that JAX gives devices."""

import jax
import pytest

from keras_gemma_ft.model.flops import peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA GeForce GTX 970", None),
    ],
)
def test_peaks_are_those_of_the_data_sheets(kind, peak):
    assert peak_flops(kind) == peak


def test_a_cpu_has_none():
    assert jax.default_backend() == "cpu"
    assert peak_flops() is None
