"""Reading a model's weights while `fit` runs."""

from __future__ import annotations

import keras
import numpy as np


def snapshot(model: keras.Model) -> dict[str, np.ndarray]:
    """A copy of the trainable variables by path, in host memory.

    Inside an epoch Keras's JAX trainer holds the live state elsewhere, so it is brought back first; that
    costs a little time, and is not for every step.
    """
    sync = getattr(model, "jax_state_sync", None)
    if sync is not None:
        sync()
    # `np.array` copies: on CPU, `np.asarray` would share the buffer that the next step donates.
    return {variable.path: np.array(variable.value) for variable in model.trainable_variables}
