"""A run's record without the texts of its rows and without places on a machine: for a report to be shared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from keras_gemma_ft.evaluate.classification import ABSTAINED, INVALID
from keras_gemma_ft.evaluate.run_record import RunRecord

# Fields of the config that name files or directories.
_PLACES = {"data": ("train", "eval", "data_dir"), "": ("preset",)}
_PUBLIC = ("hf:", "tfds:")


def without_rows(run: RunRecord) -> RunRecord:
    """The same run with all its numbers, and no prompt, expected answer, answer, directory or kernel's name.

    Of the worst rows the place, the score and the lengths are left. Labels are answers, too: classes are
    numbered in the alphabetical order of their labels, so that whoever has the rows can tell them.
    """
    evaluation = {name: value for name, value in run.evaluation.items() if name != "worst"}
    evaluation["worst_places"] = [_place(row) for row in run.evaluation.get("worst") or []]
    details = evaluation.get("details") or {}
    evaluation["details"] = {name: _numbered(of_model) for name, of_model in details.items()}
    if "forgetting" in evaluation:
        source = _file_name(evaluation["forgetting"]["source"])
        evaluation["forgetting"] = {**evaluation["forgetting"], "source": source}
    data = dict(run.manifest.get("data") or {})
    if "files" in data:
        data["files"] = {_file_name(name): value for name, value in data["files"].items()}
    environment = dict(run.manifest.get("environment") or {})
    if "platform" in environment:
        environment["platform"] = environment["platform"].partition("-")[0]
    return dataclasses.replace(
        run,
        metrics=[{**record, "samples": []} if "samples" in record else record for record in run.metrics],
        evaluation=evaluation,
        config=_without_directories(run.config),
        manifest={**run.manifest, "data": data, "environment": environment},
    )


def _place(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row by its place, how it was answered, and lengths in words."""
    return {
        "place": _file_name(row["origin"]),
        "note": row["tuned"]["note"] or "–",
        "score": row["tuned"]["score"],
        "prompt_words": sum(len(message["content"].split()) for message in row["prompt"]),
        "expected_words": len(row["reference"].split()),
        "answer_words": len(row["tuned"]["answer"].split()),
    }


def _numbered(details: Mapping[str, Any]) -> dict[str, Any]:
    """A task's details in which "class 1" and so on stand for labels."""
    if "labels" not in details:
        return dict(details)
    names = {label: f"class {number}" for number, label in enumerate(sorted(details["labels"]), 1)}
    names |= {ABSTAINED: ABSTAINED, INVALID: INVALID}

    def named(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list):
            return [named(item) for item in value]
        return names[value] if isinstance(value, str) else value

    numbered: dict[str, Any] = named(details)
    return numbered


def _without_directories(config: Mapping[str, Any]) -> dict[str, Any]:
    short: dict[str, Any] = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in config.items()
    }
    for group, fields in _PLACES.items():
        place: dict[str, Any] = short.get(group, {}) if group else short
        for field in fields:
            if place.get(field):
                place[field] = ",".join(_file_name(name.strip()) for name in place[field].split(","))
    return short


def _file_name(place: str) -> str:
    """What comes after the last directory; names of public datasets are whole."""
    return place if place.startswith(_PUBLIC) else place.rstrip("/").rpartition("/")[2]
