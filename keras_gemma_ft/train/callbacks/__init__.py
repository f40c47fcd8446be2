"""Ordinary Keras callbacks that watch a run; each is usable alone."""

from keras_gemma_ft.train.callbacks.lazy_logs import LazyLogs
from keras_gemma_ft.train.callbacks.learning_audit import LearningAudit
from keras_gemma_ft.train.callbacks.measurements import Measurements
from keras_gemma_ft.train.callbacks.overfitting_detector import OverfittingDetector
from keras_gemma_ft.train.callbacks.validation import Validation

__all__ = ["LazyLogs", "LearningAudit", "Measurements", "OverfittingDetector", "Validation"]
