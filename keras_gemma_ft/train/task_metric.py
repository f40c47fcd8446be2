"""A metric of the task over what a model in training answers, scored as `evaluate` scores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from keras_gemma_ft.best_metric import LOSSES
from keras_gemma_ft.data.dataset import PackedDataset
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.classification import Classification
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.tasks import TaskScores, build_task
from keras_gemma_ft.train.answers import as_sample, questions

# The kind of task is told, and labels are known, by that many held-out rows.
_ROWS_READ = 1000


class TaskMetric:
    """One metric of a task, known to be measurable on the held-out rows.

    Args:
        name: As `train.best_metric` has it.
        kind: As `task.kind` has it; "auto" decides by the samples.
        samples: `prompt` and `expected` of held-out rows.

    Raises:
        UserError: The task that the samples are of has no such metric, or lacks a library.
    """

    def __init__(self, name: str, kind: str, samples: Sequence[Mapping[str, str]]) -> None:
        self.name = name
        self._task = build_task(kind, [_example(sample) for sample in samples])
        if isinstance(self._task, Classification):
            self._task.labels = sorted({sample["expected"].strip() for sample in samples})
        as_expected = self._score([{**sample, "answer": sample["expected"]} for sample in samples])
        names = [metric.name for metric in as_expected.metrics]
        if name not in names:
            raise UserError(
                f"{name!r} is not measured on these held-out rows, whose task is {self._task.kind}",
                where="train.best_metric",
                remedy=f"choose one of {', '.join([*LOSSES, *names])}; or name the task in task.kind.",
            )

    @classmethod
    def from_config(cls, config: ConfigDict, held_out: PackedDataset) -> TaskMetric | None:
        """The metric that a config names; None where it is one of the losses.

        Raises:
            UserError: As the class does.
        """
        name = config.train.best_metric
        if name in LOSSES:
            return None
        asked, tokenizer = questions(held_out, _ROWS_READ), Tokenizer.from_preset(config.preset)
        return cls(name, config.task.kind, [as_sample(question, tokenizer) for question in asked])

    def __call__(self, samples: Sequence[Mapping[str, str]]) -> float:
        """Its value over `prompt`, `expected` and `answer` of each sample."""
        return next(metric.value for metric in self._score(samples).metrics if metric.name == self.name)

    def _score(self, samples: Sequence[Mapping[str, str]]) -> TaskScores:
        examples = [_example(sample) for sample in samples]
        answers = [sample["answer"].strip() for sample in samples]
        return self._task.score(answers, [example.reference for example in examples], examples)


def _example(sample: Mapping[str, str]) -> Example:
    return Example(({"role": "user", "content": sample["prompt"]},), sample["expected"].strip())
