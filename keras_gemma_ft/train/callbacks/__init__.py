"""Ordinary Keras callbacks that watch a run; each is usable alone."""

from keras_gemma_ft.train.callbacks.learning_audit import LearningAudit
from keras_gemma_ft.train.callbacks.overfitting_detector import OverfittingDetector

__all__ = ["LearningAudit", "OverfittingDetector"]
