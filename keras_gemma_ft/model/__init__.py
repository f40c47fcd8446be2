"""The Gemma 4 decoder, its Keras model, adapters, quantization, names and loading."""

from keras_gemma_ft.backend import require_jax

require_jax()
