"""Training: the run, its optimizer, what watches it, and what it leaves behind."""

from keras_gemma_ft.backend import require_jax

require_jax()
