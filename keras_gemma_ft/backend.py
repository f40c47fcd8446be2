"""Keras runs on JAX here: chosen where nothing else is, and checked before anything needs it."""

from __future__ import annotations

import os
import sys

from keras_gemma_ft.errors import UserError

VARIABLE = "KERAS_BACKEND"


def choose_jax() -> None:
    """Sets KERAS_BACKEND to jax where it is unset. Keras reads it once, when it is imported."""
    if not os.environ.get(VARIABLE):
        os.environ[VARIABLE] = "jax"


def require_jax() -> None:
    """Checks what Keras runs on, or would run on if it were imported now.

    Raises:
        UserError: Another backend than JAX.
    """
    keras = sys.modules.get("keras")
    wanted = os.environ.get(VARIABLE, "")
    actual = keras.config.backend() if keras is not None else wanted
    if actual == "jax":
        return
    remedy = (
        "import keras_gemma_ft before keras, or set KERAS_BACKEND=jax."
        if wanted == "jax"
        else "set the environment variable KERAS_BACKEND to jax, or unset it."
    )
    raise UserError(f"keras_gemma_ft needs Keras on JAX, not on {actual}", where=VARIABLE, remedy=remedy)


def is_first_process() -> bool:
    """Of the processes of a run on several hosts: whether it writes what the run has once.

    That is everything but checkpoints, of which each process writes its part.
    """
    import jax

    return jax.process_index() == 0
