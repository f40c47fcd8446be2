"""The verb `evaluate` on runs of the embedded preset whose checkpoints are made up, not trained."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keras_gemma_ft import checkpoint, cli
from keras_gemma_ft.config import config_from
from keras_gemma_ft.evaluate.run import Options, _drawn, main
from keras_gemma_ft.json_files import read_json, read_lines, write_json
from keras_gemma_ft.model import objective
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.from_config import build_base, build_model
from keras_gemma_ft.model.gemma4 import Settings
from keras_gemma_ft.model.weights import table
from keras_gemma_ft.presets import DEMO, embedded_presets

ROWS = 12


def make_run(place: Path, method: str) -> Any:
    """A run directory whose checkpoint is the preset with changed adapters, or with changed norms."""
    config = config_from(
        {
            "preset": "gemma4_tiny",
            "method": method,
            "precision": "float32",
            "lora": {"rank": 2},
            "task": {"kind": "classification"},
            "data": {"train": str(DEMO / "train.jsonl"), "eval": str(DEMO / "held_out.jsonl")},
        }
    )
    model = build_model(config)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        if method == "lora" or "norm" in variable.path:
            variable.assign(variable.value + rng.normal(0, 0.02, variable.shape))
    with checkpoint.Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(model, 7, eval_loss=1.5)
    write_json(place / "config.json", config.to_dict())
    return config


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.heavy)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place = tmp_path_factory.mktemp(request.param)
    return place, make_run(place, request.param)


def test_base_and_tuned_are_compared_on_the_held_out_rows(run, capsys):
    place, config = run
    evaluation = main(config, place, Options(rows=ROWS, batch_size=4, forgetting="general"))

    # The models themselves, asked without the verb.
    rows = list(read_lines(place / "predictions.jsonl"))
    held_out = {row["prompt"]: row["response"] for row in read_lines(DEMO / "held_out.jsonl")}
    prompts = [row["prompt"][0]["content"] for row in rows]
    assert [held_out[prompt] for prompt in prompts] == [row["reference"] for row in rows]
    assert len(set(prompts)) == ROWS
    assert all(row["base"]["answer"] for row in rows), "the base must say something"
    for name, model in (("base", build_base(config)), ("tuned", checkpoint.tuned_model(config, place)[0])):
        answers = model.generate(prompts, 16, batch_size=4)
        for row, answer in zip(rows, answers, strict=True):
            given = row[name]["answer"]
            assert given == answer.strip()[: len(given)]
    assert [row["base"] for row in rows] != [row["tuned"] for row in rows]

    stored = read_json(place / "evaluation.json")
    assert stored["checkpoint"] == {"step": 7, "held_out_loss": 1.5, "best_by": "loss"}
    assert stored["rows"] == ROWS
    assert stored["forgetting"]["rows"] > 50
    printed = capsys.readouterr().out
    assert "12 of 240 held-out rows; the tuned model is that of step 7" in printed
    assert f"{evaluation.metric('loss').tuned.value:.3f}" in printed
    # No training was recorded, so all advice is on the answers.
    advice = read_json(place / "metrics.json")["advice"]
    assert any(line.startswith("classes: Never recognized") for line in advice)
    assert all(f"next: {line[:40]}" in printed for line in advice)
    assert (place / "report.html").exists()
    assert (place / "report.md").exists()


def test_rows_are_the_same_ones_each_time():
    rows: list[Any] = list(range(100))
    assert _drawn(rows, 10, seed=3) == _drawn(rows, 10, seed=3) == sorted(_drawn(rows, 10, seed=3))
    assert _drawn(rows, 10, seed=3) != _drawn(rows, 10, seed=4)
    assert _drawn(rows, None, seed=0) == _drawn(rows, 100, seed=0) == rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rows=0"], "--rows: 0 rows"),
        (["--forgetting=no.jsonl"], "no.jsonl"),
        (["--config=tiny"], "evaluate takes the config of the run"),
    ],
)
def test_faults_are_named(run, flags, message, capsys):
    assert cli.main(["evaluate", f"--workdir={run[0]}", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_a_checkpoint(tmp_path, capsys):
    write_json(tmp_path / "config.json", {"data": {"train": str(DEMO / "train.jsonl")}})
    for verb in ("evaluate", "chat"):
        assert cli.main([verb, f"--workdir={tmp_path}"]) == 2
        error = capsys.readouterr().err
        assert "holds no checkpoint" in error
        assert "train first" in error


@pytest.mark.parametrize("length", [64, 2048])
def test_losses_of_any_vocabulary_take_one_chunk_of_logits(length):
    """Compiled, not run: what a batch of held-out rows takes beyond the same batch with few words."""
    batch_tokens, vocabulary = 8192, 262_144

    def temporary_bytes(vocabulary: int) -> int:
        config = dataclasses.replace(
            tiny_config(), vocab_size=vocabulary, vocab_size_per_layer_input=vocabulary
        )
        params = {
            name: jax.ShapeDtypeStruct(weight.stacked_shape, jnp.float32)
            for name, weight in table(config).items()
        }
        rows = [jax.ShapeDtypeStruct((batch_tokens // length, length), jnp.int32)] * 3
        mask = jax.ShapeDtypeStruct(rows[0].shape, bool)
        lowered = objective.row_losses.lower(config, Settings(jnp.float32), params, None, *rows, mask)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    chunk = 4 * 1024 * 16_384
    of_all_tokens = 4 * batch_tokens * vocabulary
    taken = temporary_bytes(vocabulary) - temporary_bytes(1024)
    assert taken < 2 * chunk < of_all_tokens / 50


def tiny_config() -> Gemma4Config:
    return Gemma4Config.from_hf(read_json(embedded_presets()["gemma4_tiny"] / "config.json"))
