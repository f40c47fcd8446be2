"""Tokenizes, masks and packs once, into files that training maps into memory.

    directory/
      manifest.json                 sources, vocabulary, template, recipe, counts, shards
      rows-00000.token_ids.npy      int32 [rows, max_length]
      rows-00000.segment_ids.npy    uint16 [rows, max_length]
      rows-00000.loss_mask.npy      bool [rows, max_length]
      rows-00001. ...

The directory appears when all of it is written, or not at all. It is used again when sources, vocabulary,
template and recipe are the same, and refused when one of them is not. Conversations stream through in chunks:
neither they nor the rows need to fit into memory. A chunk becomes a shard, whatever the number of workers, so
that the files are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from keras_gemma_ft.data.dataset import MANIFEST, PackedDataset
from keras_gemma_ft.data.rows import Problem, Row
from keras_gemma_ft.data.shards import Recipe, Shard, ShardMaker
from keras_gemma_ft.data.staging import staging
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.data.workers import ChunkedWork, Work
from keras_gemma_ft.errors import UserError

# Raised when the same input would give other rows, or files of another layout.
_FORMAT = 1
_LISTED_PROBLEMS = 20

Progress = Callable[[Counter[str]], None]


def prepare(
    conversations: Iterable[Row],
    directory: str | Path,
    tokenizer: Tokenizer,
    recipe: Recipe,
    sources: Mapping[str, str],
    on_error: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    progress: Progress | None = None,
) -> PackedDataset:
    """Prepares a dataset, or opens it if that was done before.

    Args:
        conversations: Read one by one, and only if the dataset is not there yet. A problem among them
            is a row that the reader found wrong.
        directory: Where to write; must not exist, be empty, or hold what a call like this one wrote.
        tokenizer: The preset's vocabulary.
        recipe: How rows are made.
        sources: Name and hash of everything that the conversations come from; see `files.hash_files`.
        on_error: Whether a conversation that cannot be trained on stops the work, or is left out and counted.
        workers: Processes that encode; see `ChunkedWork`.
        progress: Called after every shard with the counts so far.

    Returns:
        The dataset. Its manifest holds `counts`:
        `conversations` read; `skipped` (cannot be trained on); `dropped`, `truncated` and `split` (too long);
        `cut_model_turns` (lost their `<turn|>`); `dropped_exchanges`; `examples` in the rows; `rows`;
        `tokens`; `trained_tokens`; `neutralized_tokens` and `neutralized_conversations` (spelled control
        tokens).

    Raises:
        UserError: A conversation is at fault (and `on_error` is `stop`), nothing is left to train, the
            directory was prepared from something else, or it cannot be written.
    """
    directory = Path(directory)
    identity = _identity(tokenizer, recipe, sources, on_error)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        return _reopen(directory, identity)
    work = ChunkedWork(conversations, recipe.max_length, workers)
    total: Counter[str] = Counter()
    problems: list[Problem] = []
    shards: list[dict[str, Any]] = []
    with staging(directory, "the prepared data") as place:
        for shard in work.results(partial(_start, tokenizer, recipe, place)):
            if shard.problems and on_error == "stop":
                raise shard.problems[0].error()
            problems += shard.problems[: _LISTED_PROBLEMS - len(problems)]
            total += shard.counts
            total["rows"] += shard.rows
            if shard.rows:
                shards.append({"name": shard.name, "rows": shard.rows, "sha256": shard.sha256})
            if progress:
                progress(total)
        if not total["trained_tokens"]:
            raise _nothing_to_train(total, problems, recipe)
        manifest = {
            "identity": identity,
            "counts": dict(sorted(total.items())),
            "efficiency": round(total["tokens"] / (total["rows"] * recipe.max_length), 4),
            "sha256": hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest(),
            "problems": [str(problem.error()) for problem in problems],
            "length": recipe.max_length,
            "shards": shards,
        }
        (place / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False), encoding="utf-8")
    return PackedDataset.open(directory)


def findings(manifest: Mapping[str, Any]) -> list[str]:
    """What a person should know about a prepared dataset, a line each; nothing where all went in whole."""
    counts: Mapping[str, int] = Counter(manifest["counts"])
    recipe = manifest["identity"]["recipe"]
    sentences = {
        "skipped": "could not be trained on and were left out",
        "dropped": f"were left out: longer than {recipe['max_length']} tokens",
        "truncated": f"were shortened to {recipe['max_length']} tokens ({recipe['truncation']})",
        "split": f"were split into rows of {recipe['max_length']} tokens",
        "neutralized_conversations": "spell control tokens, which were encoded as ordinary text",
    }
    of = f"of {counts['conversations']:,} conversations"
    lines = [f"{counts[name]:,} {of} {said}." for name, said in sentences.items() if counts[name]]
    if counts["skipped"]:
        lines[0] += f" The first: {manifest['problems'][0].splitlines()[0]}"
    if counts["cut_model_turns"]:
        lines.append(
            f"{counts['cut_model_turns']:,} model turns lost their end (<turn|>) and teach no stopping."
        )
    if counts["dropped_exchanges"]:
        lines.append(f"{counts['dropped_exchanges']:,} exchanges were left out: each is longer than a row.")
    return lines


def _identity(
    tokenizer: Tokenizer, recipe: Recipe, sources: Mapping[str, str], on_error: str
) -> dict[str, Any]:
    """What the rows follow from. The template's hash covers code that a setting's name does not."""
    return {
        "sources": dict(sources),
        "vocabulary_sha256": tokenizer.sha256,
        "template_sha256": recipe.template.sha256,
        "recipe": recipe.to_json(),
        "on_error": on_error,
        "format": _FORMAT,
    }


def _reopen(directory: Path, identity: dict[str, Any]) -> PackedDataset:
    if not (directory / MANIFEST).is_file():
        raise UserError(
            "there is something else than prepared data",
            where=str(directory),
            remedy="give another directory.",
        )
    dataset = PackedDataset.open(directory)
    made = dataset.manifest.get("identity", {})
    changed = [name for name, value in identity.items() if name != "sources" and made.get(name) != value]
    # By content and order: the same file under another name is the same.
    if list(made.get("sources", {}).values()) != list(identity["sources"].values()):
        changed.insert(0, "sources")
    if not changed:
        return dataset
    if changed[0] == "recipe":
        was, now = made.get("recipe", {}), identity["recipe"]
        changed[0] = ", ".join(
            f"{name} (was {was.get(name)}, is {now[name]})" for name in now if was.get(name) != now[name]
        )
    raise UserError(
        f"the prepared data were made with other {', '.join(changed).replace('_sha256', '')}",
        where=str(directory),
        remedy="delete the directory to prepare them again, or give another one.",
    )


def _start(tokenizer: Tokenizer, recipe: Recipe, directory: Path) -> Work[Shard]:
    return partial(ShardMaker(tokenizer, recipe).make, directory=directory)


def _nothing_to_train(counts: Counter[str], problems: Sequence[Problem], recipe: Recipe) -> UserError:
    if not counts["conversations"]:
        return UserError("the dataset is empty", remedy="give a file with conversations.")
    if counts["dropped"] > counts["skipped"]:
        return UserError(
            f"nothing is left to train: {counts['dropped']:,} conversations are longer than "
            f"{recipe.max_length} tokens",
            remedy="raise data.max_length, or choose another data.truncation.",
        )
    if problems:
        first = problems[0]
        return UserError(
            f"no token of the dataset is trained; the first: {first.what}", first.where, first.remedy
        )
    return UserError(
        "no token of the dataset is trained",
        remedy="every conversation needs an answer of role assistant (or model).",
    )
