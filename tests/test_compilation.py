"""What JAX's environment is before it is imported."""

from pathlib import Path

from keras_gemma_ft.compilation import CACHE, JAX_CACHE, JAX_LEAST, prepare


def prepared(**environment: str) -> dict[str, str]:
    prepare(environment)
    return environment


def test_programs_are_kept_in_the_users_cache_directory():
    assert prepared()[JAX_CACHE] == str(Path("~/.cache/keras_gemma_ft/compiled").expanduser())
    assert prepared(XDG_CACHE_HOME="/var/cache/me")[JAX_CACHE] == "/var/cache/me/keras_gemma_ft/compiled"


def test_programs_are_kept_elsewhere_or_nowhere_if_asked_for():
    assert prepared(**{CACHE: "/fast/disk"})[JAX_CACHE] == "/fast/disk"
    assert JAX_CACHE not in prepared(**{CACHE: "off"})
    assert prepared(**{JAX_CACHE: "/given/to/jax", CACHE: "/fast/disk"})[JAX_CACHE] == "/given/to/jax"


def test_programs_of_a_tenth_of_a_second_are_kept_unless_the_user_says_otherwise():
    assert prepared()[JAX_LEAST] == "0.1"
    assert prepared(**{JAX_LEAST: "5"})[JAX_LEAST] == "5"
    assert JAX_LEAST not in prepared(**{CACHE: "off"})


def test_flags_are_added_to_the_users_unless_they_set_them():
    triton, slices = "--xla_gpu_enable_triton_gemm=false", "--xla_gpu_enable_dynamic_slice_fusion=false"
    assert prepared()["XLA_FLAGS"] == f"{triton} {slices}"
    assert prepared(XLA_FLAGS="--a=1")["XLA_FLAGS"] == f"--a=1 {triton} {slices}"
    own = "--xla_gpu_enable_triton_gemm=true"
    assert prepared(XLA_FLAGS=own)["XLA_FLAGS"] == f"{own} {slices}"
