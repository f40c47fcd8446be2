"""Free text against a reference: BLEU and chrF by sacrebleu, ROUGE by rouge-score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.evaluate.examples import Example
from keras_gemma_ft.evaluate.statistics import Metric, mean_metric
from keras_gemma_ft.evaluate.tasks import Outcome, TaskScores

_ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


class Generation:
    """Corpus BLEU and chrF2 with sacrebleu's signatures; mean ROUGE-1, ROUGE-2 and ROUGE-L (F1, stemmed).

    A row's own score is its ROUGE-L.
    """

    kind = "generation"
    generates = True

    def detect(self, examples: Sequence[Example]) -> bool:
        """Whatever no other kind recognizes."""
        return True

    def score(
        self, predictions: Sequence[str], references: Sequence[str], examples: Sequence[Example]
    ) -> TaskScores:
        sacrebleu = import_metric_library("sacrebleu")
        rouge = import_metric_library("rouge_score.rouge_scorer").RougeScorer(list(_ROUGE), use_stemmer=True)
        by_row = [
            rouge.score(reference, answer) for answer, reference in zip(predictions, references, strict=True)
        ]
        metrics = [
            mean_metric(name.lower(), title, [scores[name].fmeasure for scores in by_row])
            for name, title in _ROUGE.items()
        ]
        signatures = {"rouge": "rouge-score, F1, Porter stemmer"}
        for name, title, scorer in (("bleu", "BLEU", sacrebleu.BLEU()), ("chrf", "chrF2", sacrebleu.CHRF())):
            metrics.append(_corpus_metric(name, title, scorer, predictions, references))
            signatures[name] = str(scorer.get_signature())
        outcomes = [
            Outcome(scores["rougeL"].fmeasure, note="" if answer.strip() else "empty answer")
            for scores, answer in zip(by_row, predictions, strict=True)
        ]
        # ROUGE-L first: it is the one that a row has too.
        metrics.sort(key=lambda metric: metric.name != "rougel")
        return TaskScores(metrics, outcomes, {"signatures": signatures})


def _corpus_metric(
    name: str, title: str, scorer: Any, predictions: Sequence[str], references: Sequence[str]
) -> Metric:
    """A corpus score as a function of summed segment statistics, which is how sacrebleu defines it.

    The statistics come from the methods that sacrebleu's own bootstrap uses; a test compares with
    `corpus_score`.
    """
    segments = scorer._extract_corpus_statistics(list(predictions), [list(references)])

    def combine(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1])
        scores = [scorer._compute_score_from_stats(np.rint(row).astype(int).tolist()).score for row in flat]
        return np.asarray(scores).reshape(sums.shape[:-1])

    return Metric(name, title, np.asarray(segments, np.float64), combine)


def import_metric_library(module: str, load: Callable[[str], ModuleType] | None = None) -> Any:
    """Imports a library of the extra `eval`.

    Raises:
        UserError: It is not installed.
    """
    import importlib

    try:
        return (load or importlib.import_module)(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"this kind of task needs the Python package {error.name!r}",
            where="task.kind",
            remedy="install it with: pip install 'keras-gemma-ft[eval]'.",
        ) from error
