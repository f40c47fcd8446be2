"""Evaluation: base against tuned on held-out conversations, by kind of task, and the report."""

from keras_gemma_ft.evaluate.compare import Answer, Evaluation, Model, Row, evaluate_models
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.forgetting import forgetting_check, general_conversations
from keras_gemma_ft.evaluate.statistics import Comparison, Interval, Metric
from keras_gemma_ft.evaluate.table import comparison_table
from keras_gemma_ft.evaluate.tasks import Outcome, Task, TaskScores, build_task, kinds

__all__ = [
    "Answer",
    "Comparison",
    "Evaluation",
    "Example",
    "Interval",
    "Metric",
    "Model",
    "Outcome",
    "Row",
    "Task",
    "TaskScores",
    "build_task",
    "comparison_table",
    "evaluate_models",
    "forgetting_check",
    "general_conversations",
    "kinds",
]
