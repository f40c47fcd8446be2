"""The schema of a run: every config field with its unit, default, meaning of None, and recommended range.

`FIELDS` is the only place where a field is defined. A recipe in `configs/` starts from `default_config()` and
changes what it needs; `validate` says what is wrong with the result, by field.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict, config_dict

from keras_gemma_ft import best_metric
from keras_gemma_ft.errors import UserError


@dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
        name: Dotted, as in `--config.lora.rank=32`.
        default: Its value unless a recipe says otherwise.
        about: What it is, with its unit.
        kind: Its type; None: the type of the default.
        none: What None means; empty where None is not allowed.
        choices: The allowed values of a string; empty: any.
        low, high: The allowed range, both ends included.
        recommended: A range in words; what lies outside is allowed, and `plan` advises on it.
    """

    name: str
    default: Any
    about: str
    kind: type | None = None
    none: str = ""
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    recommended: str = ""

    @property
    def type(self) -> type:
        return self.kind or type(self.default)


POSITIVE = math.nextafter(0.0, 1.0)  # the least float above zero: "more than 0" as a closed range
BELOW_ONE = math.nextafter(1.0, 0.0)
QUANTIZED = ("nf4", "int8")
TRACKERS = ("wandb", "trackio")
TASKS = ("auto", "classification", "extraction", "numeric", "instructions", "generation", "perplexity")

# Rows that the fine-tuning guide recommends, by purpose: from, to.
DATASET_SIZES: Mapping[str, tuple[int, int]] = {
    "task-specific": (500, 5_000),
    "domain adaptation": (10_000, 50_000),
    "style": (200, 1_000),
    "instruction tuning": (5_000, 20_000),
}

FIELDS: tuple[Field, ...] = (
    Field(
        "preset",
        "gemma4_tiny",
        "the model to start from: gemma4_tiny (comes with the package), a local directory, "
        "hf://ORG/NAME, or a KerasHub preset such as gemma4_instruct_4b",
    ),
    Field(
        "method",
        "lora",
        "what is trained",
        choices=("lora", "qlora", "full"),
        recommended="lora; qlora to save memory; full for models under 1 B parameters",
    ),
    Field(
        "precision",
        "bfloat16",
        "dtype of frozen weights and activations; adapters and optimizer are float32",
        choices=("bfloat16", "float32"),
        recommended="bfloat16 on accelerators",
    ),
    Field(
        "seed",
        0,
        "seed of the data order, the held-out split, the adapters' start and dropout",
        low=0,
        high=2**31 - 1,
    ),
    Field("lora.rank", 16, "width of each adapter", low=1, recommended="16 to 64"),
    Field(
        "lora.alpha",
        None,
        "an adapter's output is scaled by alpha / rank",
        kind=float,
        none="2 × rank",
        low=POSITIVE,
        recommended="2 × rank",
    ),
    Field(
        "lora.dropout",
        0.05,
        "share of an adapter's inputs dropped in training",
        low=0.0,
        high=BELOW_ONE,
        recommended="0.05 to 0.1",
    ),
    Field(
        "lora.targets",
        "all-linear",
        "which matrices of the text decoder get adapters, with commas: all-linear means the seven "
        "projections; or names (q_proj,v_proj); experts only by name "
        "(all-linear,experts_gate_up,experts_down)",
        recommended="all-linear",
    ),
    Field(
        "quantization.weights",
        None,
        "how frozen matrices are stored",
        kind=str,
        choices=QUANTIZED,
        none="nf4 for qlora, else `precision`",
        recommended="nf4",
    ),
    Field(
        "quantization.embedding",
        None,
        "how the token embedding is stored",
        kind=str,
        choices=QUANTIZED,
        none="`precision`",
    ),
    Field(
        "quantization.per_layer_embedding",
        None,
        "how the per-layer embedding of E2B and E4B is stored; host: unquantized in the host's memory, "
        "which LoRA may use too",
        kind=str,
        choices=(*QUANTIZED, "host"),
        none="`precision`",
    ),
    Field(
        "data.train",
        "",
        "training data: files (data/*.jsonl.gz, gs://…), tfds:NAME/CONFIG:VERSION#SPLIT or "
        "hf:ORG/NAME:CONFIG#SPLIT, several with commas",
    ),
    Field(
        "data.weights",
        None,
        "how often an epoch has the rows of each name in `data.train`, with commas: 2,0.5",
        kind=str,
        none="all once",
    ),
    Field(
        "data.row_weight",
        None,
        "column of a row's own weight: how often an epoch has it, such as the `weight` of `data clean`",
        kind=str,
        none="all alike",
    ),
    Field(
        "data.data_dir",
        None,
        "directory of TensorFlow datasets",
        kind=str,
        none="$TFDS_DATA_DIR, or else ~/tensorflow_datasets",
    ),
    Field(
        "data.eval",
        None,
        "held-out data, named as in `data.train`",
        kind=str,
        none="`data.eval_fraction` of the training rows is held out",
    ),
    Field(
        "data.format",
        "auto",
        "format of the files; auto looks at each one's name and beginning",
        choices=("auto", "jsonl", "json", "csv", "tsv", "parquet"),
    ),
    Field(
        "data.layout",
        "auto",
        "what the rows' columns hold; auto looks at each file's first row",
        choices=("auto", "messages", "prompt_response", "alpaca", "spans"),
    ),
    Field("data.prompt", "prompt", "column of questions; dots reach into objects (userInput.text)"),
    Field("data.response", "response", "column of answers, or with layout spans of the spans"),
    Field(
        "data.messages", None, "column of message lists", kind=str, none="`messages`, or else `conversations`"
    ),
    Field(
        "data.template",
        None,
        "the question as text with columns in braces: Classify: {text}",
        kind=str,
        none="`data.prompt` as it is",
    ),
    Field(
        "data.label",
        None,
        "column of the row's class: to stratify and balance, never shown to the model",
        kind=str,
        none="the answer if task.kind is classification, else no class",
    ),
    Field(
        "data.max_length",
        2048,
        "tokens of a row, and the most that an example may have",
        low=16,
        recommended="512 to 4096",
    ),
    Field(
        "data.truncation",
        "drop",
        "what becomes of longer examples; all are counted",
        choices=("drop", "truncate_left", "truncate_right", "split_turns"),
    ),
    Field(
        "data.thinking",
        "last_turn",
        "which reasoning of model messages is shown: after the last user message, all of it, or none",
        choices=("last_turn", "keep", "off"),
    ),
    Field("data.train_on", "all", "which model turns are trained", choices=("all", "last")),
    Field("data.packing", True, "whether several examples share a row, isolated from each other"),
    Field(
        "data.on_error",
        "stop",
        "what a wrong row does: stop the run, or be skipped and counted",
        choices=("stop", "skip"),
    ),
    Field(
        "data.eval_fraction",
        0.1,
        "share of the rows held out where there is no `data.eval`",
        low=0.001,
        high=0.5,
        recommended="0.1 to 0.2",
    ),
    Field(
        "clean.dedupe",
        "near",
        "which copies `data clean` drops: none, those that repeat question and answer, or near ones too",
        choices=("off", "exact", "near"),
    ),
    Field(
        "clean.similarity",
        0.8,
        "how alike questions are near duplicates: Jaccard similarity of their stretches of 5 characters",
        low=0.5,
        high=1.0,
        recommended="0.7 to 0.9",
    ),
    Field(
        "clean.normalize",
        True,
        "whether `data clean` writes Unicode in its composed form (NFC), and plain spaces and line ends",
    ),
    Field(
        "clean.balance",
        "off",
        "what `data clean` does about classes of unequal size: drop rows until all are as small as the "
        "smallest, or give every row a `weight`",
        choices=("off", "down_sample", "weights"),
    ),
    Field(
        "train.learning_rate",
        2e-4,
        "peak learning rate",
        low=POSITIVE,
        high=1.0,
        recommended="1e-4 to 3e-4 for adapters; a tenth of that for full",
    ),
    Field(
        "train.schedule",
        "cosine",
        "how the learning rate falls after warm-up",
        choices=("cosine", "linear", "constant"),
        recommended="cosine",
    ),
    Field(
        "train.warmup_ratio",
        0.1,
        "share of the steps over which the learning rate rises",
        low=0.0,
        high=BELOW_ONE,
        recommended="0.05 to 0.1",
    ),
    Field("train.epochs", 3, "times over the training rows", low=1, recommended="1 to 5"),
    Field(
        "train.max_steps",
        None,
        "ends the run earlier; the schedule ends there too",
        kind=int,
        none="all epochs",
        low=1,
    ),
    Field(
        "train.batch_size",
        16,
        "rows an update: examples, or packed rows with `data.packing`",
        low=1,
        recommended="4 to 16",
    ),
    Field(
        "train.micro_batch_size",
        None,
        "rows on the device at once; gradients of an update's micro-batches are summed",
        kind=int,
        none="`train.batch_size`",
        low=1,
    ),
    Field(
        "train.clip_norm",
        1.0,
        "gradients are scaled down to this global norm",
        kind=float,
        none="no clipping",
        low=POSITIVE,
        recommended="1.0",
    ),
    Field(
        "train.weight_decay",
        0.0,
        "decoupled weight decay (AdamW); norms and scalars are spared",
        low=0.0,
        recommended="0 for adapters",
    ),
    Field(
        "train.remat",
        "full",
        "what the backward pass computes again: full keeps each layer's input; attention also what "
        "attention's backward pass needs; down instead what the feed-forward network gives; "
        "sublayers also what attention's output projection gives; outputs what attention and down keep; "
        "feed_forward also what gate, up and attention's output projection give; matmuls all projections' "
        "outputs; none keeps all; offload keeps each layer's input in host memory; auto compiles one after "
        "the other, the fastest first, until a step fits the device",
        choices=(
            "auto",
            "full",
            "attention",
            "down",
            "sublayers",
            "outputs",
            "feed_forward",
            "matmuls",
            "none",
            "offload",
        ),
        recommended="auto on accelerators, whose compiler takes half a minute for each; full to save memory",
    ),
    Field(
        "train.unroll",
        False,
        "write all layers out instead of scanning over them: faster where much is kept (remat=matmuls or "
        "none), and slower to compile",
    ),
    Field(
        "train.eval_every",
        None,
        "steps between held-out measurements, each with a checkpoint",
        kind=int,
        none="four times an epoch",
        low=1,
    ),
    Field(
        "train.answers",
        16,
        "training and held-out prompts each that are answered when the held-out loss stops falling, to tell "
        "learning from memorizing; a few are answered at every measurement, and all held-out ones where "
        "`train.best_metric` is one of answers; 0: none",
        low=0,
    ),
    Field(
        "train.best_metric",
        "loss",
        "by what the best checkpoint is chosen: the held-out loss or perplexity, or a metric of the task "
        "over the held-out answers of each measurement",
        choices=best_metric.NAMES,
        recommended="loss; a metric of the task with train.answers=100 or more",
    ),
    Field(
        "train.on_overfitting",
        "report",
        "what a verdict of overfitting or divergence does",
        choices=("report", "stop", "stop_and_restore_best"),
    ),
    Field(
        "train.trackers",
        "",
        "what else gets the run's numbers: wandb, trackio, or both with a comma; empty: nothing",
    ),
    Field(
        "task.kind", "auto", "how `evaluate` scores answers; auto decides by the held-out rows", choices=TASKS
    ),
)
BY_NAME: dict[str, Field] = {field.name: field for field in FIELDS}


def default_config() -> ConfigDict:
    """The defaults as a locked ConfigDict: a misspelt field in a recipe is an error there and then."""
    config = ConfigDict()
    for field in FIELDS:
        *groups, leaf = field.name.split(".")
        place = config
        for group in groups:
            if group not in place:
                place[group] = ConfigDict()
            place = place[group]
        place[leaf] = config_dict.placeholder(field.type) if field.default is None else field.default
    # None must stay possible where it means something, so those fields hold a reference that allows it.
    for field in FIELDS:
        if field.none and field.default is not None:
            group, leaf = field.name.split(".")
            config[group][leaf] = config_dict.placeholder(field.type)
            config[group][leaf] = field.default
    return config.lock()


def config_from(values: Mapping[str, Any]) -> ConfigDict:
    """A config with these values over the defaults, as from a run's config.json; validated.

    Args:
        values: Nested, as `ConfigDict.to_dict()` gives them; fields that are missing keep their defaults.

    Raises:
        UserError: A field is not known, or a value does not fit.
    """
    config = default_config()
    for name, value in flatten(values):
        known(name)
        *groups, leaf = name.split(".")
        place = config
        for group in groups:
            place = place[group]
        try:
            place[leaf] = value
        except TypeError as error:
            raise wrong_type(BY_NAME[name], value) from error
    validate(config)
    return config


def known(name: str) -> Field:
    """The field of that dotted name.

    Raises:
        UserError: There is none; the remedy names the nearest.
    """
    if name in BY_NAME:
        return BY_NAME[name]
    near = difflib.get_close_matches(name, BY_NAME, 1, 0.6)
    if not near:
        leaf = name.split(".")[-1]
        near = [field for field in BY_NAME if field.split(".")[-1] == leaf][:1]
    group = name.split(".")[0]
    fields = [field for field in BY_NAME if field.split(".")[0] == group and "." in field] or list(BY_NAME)
    raise UserError(
        "there is no such config field",
        where=name,
        remedy=f"did you mean {near[0]}?" if near else f"the fields are: {', '.join(fields)}.",
    )


def validate(config: Mapping[str, Any]) -> None:
    """Checks every field by itself, then those that must fit each other. Says nothing about the data.

    Raises:
        UserError: Naming the first field that is wrong, and what it may be.
    """
    values = dict(flatten(config))
    for name in values:
        known(name)
    for field in FIELDS:
        if field.name not in values:
            raise UserError(
                "is missing", where=field.name, remedy="start from keras_gemma_ft.config.default_config()."
            )
        _check(field, values[field.name])
    _check_together(values)


def weights_quantization(config: Mapping[str, Any]) -> dict[str, str] | None:
    """What `from_preset(quantization=…)` gets: only what is quantized, or None where nothing is.

    With QLoRA, `quantization.weights` of None means NF4.
    """
    quantized = {part: kind for part, kind in dict(config["quantization"]).items() if kind is not None}
    if config["method"] == "qlora":
        quantized.setdefault("weights", "nf4")
    return quantized or None


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values in the order of the config."""
    for name, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def listed(text: str) -> list[str]:
    """The names in a field that holds several, with commas between; each once."""
    return list(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))


def describe() -> str:
    """The table of fields as text, for `keras-gemma-ft train --help`."""
    lines = []
    for field in FIELDS:
        notes = [f"choices {', '.join(field.choices)}"] if field.choices else []
        notes += [f"None: {field.none}"] if field.none else []
        notes += [f"recommended {field.recommended}"] if field.recommended else []
        lines.append(f"{field.name} = {field.default!r}\n    " + "; ".join([field.about, *notes]))
    return "\n".join(lines)


def _check(field: Field, value: Any) -> None:
    if value is None:
        if not field.none:
            raise UserError("must not be None", where=field.name, remedy=f"the default is {field.default!r}.")
        return
    if not _is_of(field.type, value):
        raise wrong_type(field, value)
    if field.choices and value not in field.choices:
        near = difflib.get_close_matches(value, field.choices, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{value!r} is not one of its values",
            where=field.name,
            remedy=f"{hint}Choose {_or(field.choices)}.",
        )
    if field.type in (int, float) and not field.low <= value <= field.high:
        advice = f"; recommended: {field.recommended}" if field.recommended else ""
        raise UserError(
            f"{value!r} is out of range", where=field.name, remedy=f"it must be {_range(field)}{advice}."
        )


def _is_of(wanted: type, value: Any) -> bool:
    """Whole numbers are numbers; truth values are not, though Python counts them in."""
    if isinstance(value, bool):
        return wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _check_together(values: Mapping[str, Any]) -> None:
    if not values["data.train"]:
        raise UserError(
            "no training file is given",
            where="data.train",
            remedy="set it in the config, or --config.data.train=FILE.",
        )
    for name in listed(values["train.trackers"]):
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(
                f"{name!r} is no tracker",
                where="train.trackers",
                remedy=f"{hint}Choose {_or(TRACKERS)}, or both with a comma.",
            )
    _check_best_metric(values["train.best_metric"], values["task.kind"], values["train.answers"])
    quantized = [name for name in values if name.startswith("quantization.") and values[name] is not None]
    if values["method"] == "lora":
        quantized = [name for name in quantized if values[name] != "host"]
    if values["method"] != "qlora" and quantized:
        raise UserError(
            f"method {values['method']!r} trains on unquantized weights",
            where=quantized[0],
            remedy="set method to qlora, or leave quantization at None.",
        )
    rows, micro = values["train.batch_size"], values["train.micro_batch_size"]
    if micro is not None and rows % micro:
        raise UserError(
            f"{micro} does not divide train.batch_size = {rows}",
            where="train.micro_batch_size",
            remedy="choose " + _or([str(size) for size in range(1, rows + 1) if rows % size == 0]) + ".",
        )


def _check_best_metric(name: str, kind: str, answers: int) -> None:
    """What can be said before the held-out rows are read, which with task.kind=auto decide the rest."""
    if name in best_metric.LOSSES:
        return
    if not answers:
        raise UserError(
            f"{name!r} is measured on answers, and train.answers is 0",
            where="train.best_metric",
            remedy=f"set train.answers to 100, or choose {_or(best_metric.LOSSES)}.",
        )
    names = best_metric.TASK_METRICS.get(kind, ())
    if kind != "auto" and name not in names:
        raise UserError(
            f"{name!r} is not measured in training for task.kind={kind}",
            where="train.best_metric",
            remedy=f"choose {_or((*best_metric.LOSSES, *names))}.",
        )


def wrong_type(field: Field, value: Any) -> UserError:
    """The error for a value that the field's type does not allow."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    none = " or None" if field.none else ""
    return UserError(
        f"{value!r} is {type(value).__name__}, not {words[field.type]}{none}",
        where=field.name,
        remedy=f"it is {field.about}.",
    )


def _range(field: Field) -> str:
    low = "more than 0" if field.low == POSITIVE else f"{field.low:g} or more"
    if math.isinf(field.high):
        return low
    if field.high == BELOW_ONE:
        return f"{low} and below 1"
    return (
        f"{low} and at most {field.high:g}" if field.low == POSITIVE else f"{field.low:g} to {field.high:g}"
    )


def _or(choices: tuple[str, ...] | list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
