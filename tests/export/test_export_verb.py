"""The verb `export`, on runs whose checkpoints are real and whose adapters are random."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_hf import relative_error, transformers_logits
from test_peft import peft_logits, peft_model
from tuning import LORA

from keras_gemma_ft import cli
from keras_gemma_ft.checkpoint import Checkpoints
from keras_gemma_ft.config import default_config
from keras_gemma_ft.export.staging import CERTIFICATE
from keras_gemma_ft.json_files import write_json
from keras_gemma_ft.model.causal_lm import GemmaCausalLM

TOKENS = np.random.default_rng(0).integers(4, 300, (2, 24), np.int32)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def write_config(workdir: Path, preset: Path, method: str = "lora") -> None:
    config = default_config()
    config.preset, config.method, config.data.train = str(preset), method, "train.jsonl"
    config.lora.rank, config.lora.alpha, config.lora.dropout = LORA.rank, LORA.alpha, LORA.dropout
    write_json(workdir / "config.json", config.to_dict())


def make_run(workdir: Path, preset: Path, method: str = "lora") -> dict[int, np.ndarray]:
    """A run with a best and a last checkpoint, 3 and 5; returns the model's own logits at both."""
    write_config(workdir, preset, method)
    model = GemmaCausalLM.from_preset(str(preset), dtype="float32")
    if method != "full":
        model.enable_lora(LORA.rank, LORA.alpha, LORA.dropout)
    model.compile()
    random = np.random.default_rng(1)
    logits = {}
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step, loss in ((3, 0.5), (5, 0.75)):
            for variable in model.trainable_variables:
                change = random.normal(0, 0.1, variable.shape)
                variable.assign(np.array(variable.value) + change.astype(np.float32))
            checkpoints.save(model, step, eval_loss=loss)
            logits[step] = np.asarray(model.logits(TOKENS))
    return logits


@pytest.fixture(scope="module")
def lora_run(preset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora_run")
    return workdir, make_run(workdir, preset("31b"))


def test_both_formats_of_the_best_checkpoint(preset, lora_run, capsys):
    workdir, logits = lora_run
    assert cli.main(["export", f"--workdir={workdir}"]) == 0
    said = capsys.readouterr().out
    assert "step 3 of" in said
    assert "merged into its float32 weights" in said
    assert said.count("logits equal to") == 2
    hf, peft = workdir / "export" / "hf", workdir / "export" / "peft"
    assert relative_error(transformers_logits(hf, TOKENS), logits[3]) < 1e-4
    assert relative_error(peft_logits(peft_model(preset("31b"), peft), TOKENS), logits[3]) < 1e-4
    says = json.loads((hf / CERTIFICATE).read_text())
    assert says["trained"]["step"] == 3
    assert says["trained"]["held_out_loss"] == 0.5
    assert json.loads((peft / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        preset("31b").absolute()
    )
    assert {path.name for path in hf.iterdir()} > {"tokenizer.json", "chat_template.jinja", "config.json"}


@pytest.mark.parametrize("which", ["last", "5"])
def test_another_checkpoint_to_another_place(lora_run, tmp_path, which):
    workdir, logits = lora_run
    out = tmp_path / "here"
    arguments = [f"--workdir={workdir}", "--format=hf", f"--which={which}", f"--out={out}"]
    assert cli.main(["export", *arguments]) == 0
    assert [path.name for path in out.iterdir()] == ["hf"]
    assert relative_error(transformers_logits(out / "hf", TOKENS), logits[5]) < 1e-4


def test_an_adapter_for_another_base(lora_run, tmp_path):
    workdir, _ = lora_run
    arguments = [f"--workdir={workdir}", "--format=peft", f"--out={tmp_path}"]
    assert cli.main(["export", *arguments, "--base_model=org/name", "--whole"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert config["target_modules"].startswith(r"model\.language_model\.layers\.")


def test_a_run_of_all_weights(preset, tmp_path):
    logits = make_run(tmp_path, preset("31b"), "full")
    assert cli.main(["export", f"--workdir={tmp_path}"]) == 0
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["hf"]
    assert relative_error(transformers_logits(tmp_path / "export/hf", TOKENS), logits[3]) < 1e-4


def faults() -> dict[str, tuple[list[str], str, str]]:
    return {
        "unknown format": (["--format=hf,onnx"], "--format=hf,onnx", "choose from hf, peft, gguf"),
        "unknown checkpoint": (["--which=first"], "--which=first", "best, last, or a step"),
        "unknown type": (["--dtype=int8"], "--dtype=int8", "choose from float32, bfloat16"),
        "missing step": (["--which=4"], "holds no checkpoint of step 4", "--which=last"),
        "no converter": (["--format=gguf"], "--format=gguf", "git clone"),
        "no such flag": (["--formats=hf"], "--formats", "did you mean --format?"),
        "config given": (["--config=tiny"], "--config=tiny", "leave --config out"),
    }


@pytest.mark.parametrize("fault", faults())
def test_faults(lora_run, tmp_path, capsys, monkeypatch, fault):
    workdir, _ = lora_run
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    arguments, place, remedy = faults()[fault]
    assert cli.main(["export", f"--workdir={workdir}", f"--out={tmp_path}/out", *arguments]) == 2
    said = capsys.readouterr()
    assert place in said.err
    assert remedy in said.err
    assert len(said.err.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


def test_no_run_and_no_checkpoint(preset, tmp_path, capsys):
    assert cli.main(["export", f"--workdir={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err
    write_config(tmp_path, preset("31b"))
    assert cli.main(["export", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/checkpoints: holds no checkpoint" in said
    assert "train first" in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_other_peoples_files_stay(lora_run, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.tex").write_text("years of work")
    assert cli.main(["export", f"--workdir={lora_run[0]}", f"--out={tmp_path}"]) == 2
    assert "not an export of keras_gemma_ft" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_run_of_all_weights_has_no_adapter(preset, tmp_path, capsys):
    write_config(tmp_path, preset("31b"), "full")
    assert cli.main(["export", f"--workdir={tmp_path}", "--format=hf,peft"]) == 2
    assert "there is no adapter" in capsys.readouterr().err


def test_another_preset_than_the_runs(preset, lora_run, tmp_path, capsys):
    workdir, _ = lora_run
    config = json.loads((workdir / "config.json").read_text())
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    write_json(tmp_path / "config.json", config | {"preset": str(preset("e2b"))})
    assert cli.main(["export", f"--workdir={tmp_path}"]) == 2
    assert "what was trained does not fit the base" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_nothing_of_training_is_imported():
    import subprocess
    import sys

    script = (
        "import sys, keras_gemma_ft.export.run, keras_gemma_ft.export.model;"
        "print([name for name in sys.modules if name.startswith('keras_gemma_ft.train')"
        " or name in ('tensorflow', 'torch', 'transformers', 'keras_gemma_ft.serve')])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
