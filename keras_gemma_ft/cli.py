"""The command line: `keras-gemma-ft VERB --flag=value …`. Flags, then one call; everything else is below.

Nothing heavy is imported here: a verb's module is imported when the verb is called.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from keras_gemma_ft import compilation, stopping
from keras_gemma_ft.backend import require_jax
from keras_gemma_ft.config import describe, known, validate, wrong_type
from keras_gemma_ft.errors import UserError, is_full

PROGRAM = "keras-gemma-ft"
_HELP = ("--help", "-h", "--helpshort", "--helpfull")


@dataclass(frozen=True)
class Verb:
    """One command.

    Attributes:
        help: One line.
        example: What one would type after the verb.
        define: Adds the verb's flags, besides --workdir.
        call: Runs it: gets the config, and the parsed flags.
        takes_config: Whether --config names a recipe; otherwise the config is that of the run in --workdir.
        has_workdir: Whether it needs a run directory.
    """

    help: str
    example: str
    call: Callable[[ConfigDict, flags.FlagValues], Any]
    define: Callable[[flags.FlagValues], Any] = lambda values: None
    takes_config: bool = False
    has_workdir: bool = True


def _function(module: str, name: str = "main") -> Callable[..., Any]:
    return getattr(importlib.import_module(f"keras_gemma_ft.{module}"), name)


def _define_out(about: str) -> Callable[[flags.FlagValues], Any]:
    return lambda values: flags.DEFINE_string("out", None, about, flag_values=values)


def _required(given: flags.FlagValues, name: str) -> str:
    value = given[name].value
    if not value:
        raise UserError(f"--{name} is not given", remedy=f"add --{name}=…: {given[name].help}.")
    return value


def _define_export(values: flags.FlagValues) -> None:
    def text(name: str, default: str | None, about: str) -> None:
        flags.DEFINE_string(name, default, about, flag_values=values)

    text("format", None, "hf, peft, gguf, with commas between; default: hf, and peft if there are adapters")
    text("out", None, "where to make a directory for each format; default: export in the run directory")
    text("which", "best", "the checkpoint: best, last, or a step")
    text("dtype", None, "hf, and what gguf is made from: float32, bfloat16, float16; default: the preset's")
    text("base_model", None, "peft: what the adapters are to be loaded on; default: the preset")
    flags.DEFINE_bool(
        "whole",
        None,
        "peft: whether that is a whole Gemma 4 with its towers; default: as the preset is",
        flag_values=values,
    )
    text("llama_cpp", None, "gguf: a checkout of llama.cpp, for its converter; default: LLAMA_CPP, or PATH")
    text("gguf_type", "auto", "gguf: the type of the weights: f32, f16, bf16, q8_0; auto keeps 16 bits")


def _define_evaluate(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "rows", None, "held-out rows at most, drawn at random; default: all", flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", None, "longest answer; default: by the longest expected one", flag_values=values
    )
    flags.DEFINE_integer("batch_size", 32, "answers at once", flag_values=values)
    flags.DEFINE_bool("calibrate", False, "also how sure the models are of their answers", flag_values=values)
    flags.DEFINE_string(
        "forgetting",
        None,
        "also what tuning cost elsewhere: `general` for the rows that ship, or a file of yours",
        flag_values=values,
    )


def _define_report(values: flags.FlagValues) -> None:
    flags.DEFINE_bool(
        "quote_rows", True, "whether it may show rows, labels and directories", flag_values=values
    )
    flags.DEFINE_string(
        "out", None, "the page, with a .md beside it; default: report.html in the run", flag_values=values
    )


def _define_human(values: flags.FlagValues) -> None:
    flags.DEFINE_list("collect", [], "results that judges saved, with commas between", flag_values=values)
    flags.DEFINE_integer("rows", 50, "answers to judge at most", flag_values=values)


def _define_chat(values: flags.FlagValues) -> None:
    flags.DEFINE_string("system", None, "instructions for the model", flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "0 for the most probable answer", flag_values=values)
    flags.DEFINE_integer("top_k", 64, "draw from that many tokens", flag_values=values)
    flags.DEFINE_float("top_p", 0.95, "draw from tokens that have that share together", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 1024, "longest answer", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the draws", flag_values=values)


def _options(module: str, given: flags.FlagValues) -> Any:
    """A verb's `Options`, whose fields have the names of its flags."""
    options: Any = _function(module, "Options")
    return options(**{field.name: given[field.name].value for field in dataclasses.fields(options)})


# Name → what it does; a name of two words is a verb with a sub-verb. A verb stands here once it works.
VERBS: dict[str, Verb] = {
    "data prepare": Verb(
        "read, tokenize, mask and pack the rows that `train` then takes",
        "--config=tiny --workdir=runs/first [--config.data.train=train.jsonl]",
        lambda config, given: _function("train.examples")(config, given.workdir),
        takes_config=True,
    ),
    "data inspect": Verb(
        "show what is in a dataset, what stands out in it, and which tokens are trained",
        "--config=tiny --config.data.train=train.jsonl [--out=report.html]",
        lambda config, given: _function("data.inspect")(config, given.out and Path(given.out)),
        _define_out("where to write the report as a page"),
        takes_config=True,
        has_workdir=False,
    ),
    "data clean": Verb(
        "write a cleaned and divided copy of a dataset, and a log of every row dropped or changed",
        "--config=tiny --config.data.train=train.jsonl --out=cleaned",
        lambda config, given: _function("data.clean")(config, Path(_required(given, "out"))),
        _define_out("the directory to write to; must not exist, or be empty"),
        takes_config=True,
        has_workdir=False,
    ),
    "train": Verb(
        "fine-tune a preset on a file of conversations",
        "--config=tiny --workdir=runs/first [--config.lora.rank=32] [--resume]",
        lambda config, given: _function("train.run")(config, given.workdir, resume=given.resume),
        lambda values: flags.DEFINE_bool(
            "resume", False, "go on with the run in --workdir, with its own config", flag_values=values
        ),
        takes_config=True,
    ),
    "sweep": Verb(
        "train with several settings, longer with the better ones, and say which is best",
        "--config=tiny --sweep=rank_and_rate --workdir=runs/sweep [--config.data.train=train.jsonl]",
        lambda config, given: _function("train.trials")(config, _required(given, "sweep"), given.workdir),
        lambda values: flags.DEFINE_string(
            "sweep", None, "what to try: a path, or the name of one in configs/sweeps", flag_values=values
        ),
        takes_config=True,
    ),
    "evaluate": Verb(
        "compare what a run trained with its base on the held-out rows, and write the report",
        "--workdir=runs/first [--rows=200] [--forgetting=general]",
        lambda config, given: _function("evaluate.run")(
            config, given.workdir, _options("evaluate.run", given)
        ),
        _define_evaluate,
    ),
    "report": Verb(
        "write the report of a run again, or one without texts of its rows, to share",
        "--workdir=runs/first [--quote_rows=False --out=first.html]",
        lambda config, given: _function("evaluate.report")(
            config, given.workdir, quote_rows=given.quote_rows, out=given.out
        ),
        _define_report,
    ),
    "evaluate human": Verb(
        "write a sheet on which people judge the answers blindly, or score what they saved",
        "--workdir=runs/first [--collect=results-1.json,results-2.json]",
        lambda config, given: _function("evaluate.human")(given.workdir, given.collect, given.rows),
        _define_human,
    ),
    "export": Verb(
        "write what a run trained for transformers, PEFT, vLLM or llama.cpp, checked against the run",
        "--workdir=runs/first [--format=hf,peft] [--which=last]",
        lambda config, given: _function("export.run")(
            config,
            given.workdir,
            given.format,
            out=given.out,
            which=given.which,
            dtype=given.dtype,
            base_model=given.base_model,
            whole=given.whole,
            llama_cpp=given.llama_cpp,
            gguf_type=given.gguf_type,
        ),
        _define_export,
    ),
    "chat": Verb(
        "talk with what a run trained",
        "--workdir=runs/first [--temperature=0]",
        lambda config, given: _function("serve.chat")(config, given.workdir, _options("serve.chat", given)),
        _define_chat,
    ),
}


def run() -> None:
    """The console script: never returns."""
    # Before anything reads it. Only what goes wrong is worth a line from TensorFlow's runtime.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    compilation.prepare()
    stopping.never_lose_interrupts()
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Runs one verb.

    Args:
        arguments: Without the program's name.

    Returns:
        The exit code: 0; 2 for a fault in what the user gave; 128 + its number where a signal ended it.
    """
    verb, rest = _verb(arguments or ["help"])
    if verb in ("help", *_HELP):
        print(overview())
        return 0
    try:
        require_jax()
        if verb not in VERBS:
            family = [name for name in VERBS if name.startswith(f"{verb} ")]
            if family and any(argument in _HELP for argument in rest):
                print(overview(family))
                return 0
            raise _no_such_verb(verb)
        if any(argument in _HELP for argument in rest):
            print(verb_help(verb))
            return 0
        config, given = parse(verb, rest)
        VERBS[verb].call(config, given)
    except UserError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not is_full(error):
            raise
        command = stopping.go_on(PROGRAM, verb, arguments)
        print(f"{PROGRAM}: {stopping.disk_full(error, command, arguments)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, ImportError) as stop:
        if not stopping.is_interrupt(stop):
            raise
        in_order = hasattr(stop, "signal")
        print(str(stop) if in_order else "\nStopped at once.", file=sys.stderr)
        if verb == "sweep" or (verb == "train" and not in_order):
            print(f"Go on with: {stopping.go_on(PROGRAM, verb, arguments)}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)
    return 0


def parse(verb: str, arguments: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    """The config with its overrides, validated, and the other flags of a verb.

    Raises:
        UserError: An unknown flag, a value that does not fit, a config that is missing or faulty.
    """
    from keras_gemma_ft.recipes import read_recipe, read_run_config

    recipe, overrides, own = _sort(arguments)
    given = flags.FlagValues()
    _define(VERBS[verb], given)
    _read(given, own, verb)
    if VERBS[verb].has_workdir and not given.workdir:
        raise UserError("no run directory is given", where="--workdir", remedy="add --workdir=DIR.")
    if not VERBS[verb].takes_config and (recipe is not None or overrides):
        raise UserError(
            f"{verb} takes the config of the run", where=f"--config={recipe}", remedy="leave --config out."
        )
    if recipe is not None:
        config = read_recipe(recipe)
    elif not VERBS[verb].takes_config or getattr(given, "resume", False):
        config = read_run_config(given.workdir)
    else:
        raise UserError(
            "no config is given",
            where="--config",
            remedy=f"for example: {PROGRAM} {verb} {VERBS[verb].example}",
        )
    return _overridden(config, overrides, verb), given


def overview(names: Sequence[str] = ()) -> str:
    """What there is, for `keras-gemma-ft` alone and `--help`; or some verbs of that."""
    names = names or list(VERBS)
    width = max(map(len, names))
    return "\n".join(
        [
            "Fine-tune Gemma 4: from a file of conversations to a tuned, evaluated, exported model.",
            "",
            f"usage: {PROGRAM} VERB --flag=value …",
            "",
            *(f"  {name:<{width}}  {VERBS[name].help}" for name in names),
            "",
            f"A first run:  {PROGRAM} train {VERBS['train'].example}",
            f"More on one:  {PROGRAM} VERB --help",
        ]
    )


def verb_help(verb: str) -> str:
    """What a verb does and takes, the config's fields included."""
    values = flags.FlagValues()
    _define(VERBS[verb], values)
    lines = [f"{verb}: {VERBS[verb].help}", "", f"usage: {PROGRAM} {verb} {VERBS[verb].example}", ""]
    lines += [f"  --{name:<12} {values[name].help}" for name in values]
    if VERBS[verb].takes_config:
        from keras_gemma_ft.recipes import shipped

        lines += [
            f"  --{'config':<12} a recipe: a path, or one of {', '.join(shipped())}",
            "",
            "Every field of the config can be set as --config.FIELD=VALUE:",
            "",
            describe(),
        ]
    return "\n".join(lines)


def _verb(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of two words where its first begins several, and the arguments after it."""
    first, *rest = arguments
    has_second = any(name.startswith(f"{first} ") for name in VERBS)
    if has_second and rest and not rest[0].startswith("-"):
        return f"{first} {rest[0]}", rest[1:]
    return first, rest


def _no_such_verb(verb: str) -> UserError:
    family = [name for name in VERBS if name.startswith(f"{verb.split()[0]} ")]
    near = difflib.get_close_matches(verb, VERBS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return UserError(
        "there is no such verb", where=verb, remedy=f"{hint}There are: {', '.join(family or VERBS)}."
    )


def _define(verb: Verb, values: flags.FlagValues) -> None:
    if verb.has_workdir:
        flags.DEFINE_string("workdir", None, "the run directory", flag_values=values)
    verb.define(values)


def _sort(arguments: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
    """The recipe, the config's fields as --config.field=value, and all other flags."""
    recipe, overrides, own = None, [], []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        name = argument.lstrip("-").partition("=")[0]
        is_config = argument.startswith("-") and name.removeprefix("no").partition(".")[0] == "config"
        if is_config and "=" not in argument and left and not left[0].startswith("-"):
            argument = f"{argument}={left.pop(0)}"
        if not is_config:
            own.append(argument)
        elif "." in name:
            overrides.append(argument)
        else:
            recipe = argument.partition("=")[2]
    return recipe, overrides, own


def _overridden(config: ConfigDict, overrides: Sequence[str], verb: str) -> ConfigDict:
    """The config after --config.field=value flags, validated; ml_collections reads all values but None."""
    fields = [known(_name(argument)) for argument in overrides]
    is_none = [
        argument.endswith("=None") and field.none != ""
        for argument, field in zip(overrides, fields, strict=True)
    ]
    read = [argument for argument, none in zip(overrides, is_none, strict=True) if not none]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[PROGRAM, *read])
    try:
        _read(values, read, verb)
    except UserError as error:
        wrong = re.match(r"--config\.([\w.]+)=(.*?): ", str(error))
        raise (wrong_type(known(wrong[1]), wrong[2]) if wrong else error) from error
    for field, none in zip(fields, is_none, strict=True):
        if none:
            group, leaf = field.name.split(".")
            values.config[group][leaf] = None
    given = {field.name for field in fields}
    if "data.train" in given and "data.eval" not in given:
        # A recipe's held-out rows belong to its own training rows, not to others.
        values.config.data.eval = None
    validate(values.config)
    return values.config


def _name(override: str) -> str:
    return override.lstrip("-").partition("=")[0].removeprefix("no").removeprefix("config.")


def _read(values: flags.FlagValues, arguments: Sequence[str], verb: str) -> None:
    """Lets absl parse, and puts its complaints in our words."""
    try:
        left = values([PROGRAM, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, [*values, "config"], 1)
        remedy = f"did you mean --{near[0]}?" if near else f"see: {PROGRAM} {verb} --help"
        raise UserError("there is no such flag", where=f"--{error.flagname}", remedy=remedy) from error
    except (flags.Error, TypeError, ValueError) as error:
        message = str(error).splitlines()[0].removeprefix("flag ")
        raise UserError(message, remedy=f"see: {PROGRAM} {verb} --help") from error
    if left:
        raise UserError(
            "this is no flag: flags begin with -- and have their value after =",
            where=left[0],
            remedy=f"for example: {PROGRAM} {verb} {VERBS[verb].example}",
        )
