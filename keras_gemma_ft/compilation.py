"""How JAX compiles for us: what it keeps on disk, and what its compiler does not try."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

CACHE, JAX_CACHE = "KERAS_GEMMA_FT_CACHE", "JAX_COMPILATION_CACHE_DIR"
# A model is made by dozens of small programs. JAX's own threshold, a second, keeps none of them.
JAX_LEAST, LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1"
# Products with adapters' thin factors go to cuBLAS, which adds them to the large product in place. With
# Triton in the choice, E4B's step is 1% slower and takes 40 s to compile, not 14 (H100, jax 0.11.2).
# A product that the scan over layers keeps for the backward pass would be computed twice: once into the stack
# of what is kept, by a "dynamic slice fusion", and once for the next operation (H200, jax 0.11.2: 31B with
# remat=feed_forward ran 240 products of gate's size forward, not 120).
FLAGS = ("--xla_gpu_enable_triton_gemm=false", "--xla_gpu_enable_dynamic_slice_fusion=false")


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets JAX's environment, before it is imported. What the user set stays.

    Compiled programs are kept in the user's cache directory; $KERAS_GEMMA_FT_CACHE names another one, or is
    "off". JAX looks a program up by its text, its options, the device and the compiler's version: what is
    found is what would have been compiled. Programs that took less than a tenth of a second are not kept; a
    directory that cannot be written to costs a warning from JAX and nothing else.
    """
    given = environment.get(CACHE, "")
    if given.lower() != "off":
        base = environment.get("XDG_CACHE_HOME") or "~/.cache"
        directory = Path(given) if given else Path(base) / "keras_gemma_ft" / "compiled"
        environment.setdefault(JAX_CACHE, str(directory.expanduser()))
        environment.setdefault(JAX_LEAST, LEAST_SECONDS)
    flags = environment.get("XLA_FLAGS", "")
    missing = [flag for flag in FLAGS if flag.partition("=")[0] not in flags]
    environment["XLA_FLAGS"] = " ".join([*flags.split(), *missing])
