"""Fine-tune Gemma 4 on Keras and JAX.

The public names are loaded when they are first used, so that importing the package is quick and brings in
neither Keras nor JAX nor TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keras_gemma_ft import backend, compilation
from keras_gemma_ft.errors import UserError

if TYPE_CHECKING:
    from keras_gemma_ft import data
    from keras_gemma_ft.data import Tokenizer
    from keras_gemma_ft.model.causal_lm import GemmaCausalLM
    from keras_gemma_ft.train import optimizers

__version__ = "0.1.0"

__all__ = ["GemmaCausalLM", "Tokenizer", "UserError", "__version__", "data", "optimizers"]

backend.choose_jax()

# Public name → the module that it is, or that defines it.
_MODULES = {
    "GemmaCausalLM": "keras_gemma_ft.model.causal_lm",
    "Tokenizer": "keras_gemma_ft.data",
    "data": "keras_gemma_ft.data",
    "optimizers": "keras_gemma_ft.train.optimizers",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend.require_jax()
    compilation.prepare()  # JAX reads it when it is imported, and XLA at the first computation
    module = importlib.import_module(_MODULES[name])
    return globals().setdefault(name, getattr(module, name, module))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
