"""The whole way from the command line: what was trained answers in transformers and PEFT as it does here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from keras_gemma_ft.checkpoint import restore
from keras_gemma_ft.model.causal_lm import GemmaCausalLM
from keras_gemma_ft.presets import DEMO

NEW_TOKENS = 12
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (DEMO / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    return [json.loads(line)["prompt"] for line in lines]


def transformers_answers(directory: Path, prompts: list[str]) -> list[str]:
    """Greedy answers by an exported directory alone; one with adapters names its base itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = directory / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else directory
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    greedy = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    out = model.generate(**inputs, **greedy, max_new_tokens=NEW_TOKENS)
    answers = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@pytest.mark.heavy
def test_the_same_greedy_answers_to_fifty_held_out_prompts(prompts, tmp_path):
    run = tmp_path / "run"
    keras_gemma_ft("train", "--config=tiny", "--config.train.max_steps=40", f"--workdir={run}")
    keras_gemma_ft("export", f"--workdir={run}")
    keras_gemma_ft("export", "--format=hf", "--dtype=float32", f"--workdir={run}", f"--out={tmp_path}")
    lora = json.loads((run / "config.json").read_text())["lora"]
    model = GemmaCausalLM.from_preset("gemma4_tiny", dtype="float32")
    model.enable_lora(lora["rank"], dropout=lora["dropout"])
    restore(model, run / "checkpoints", "best")
    ours = model.generate(prompts, NEW_TOKENS)
    assert len(set(ours)) > 3, "too dull to tell anything"
    assert transformers_answers(tmp_path / "hf", prompts) == ours
    assert transformers_answers(run / "export" / "peft", prompts) == ours
    # The preset is stored in bfloat16, and so is what is merged into it: those are other weights.
    rounded = GemmaCausalLM.from_preset(str(run / "export" / "hf"), dtype="float32")
    assert transformers_answers(run / "export" / "hf", prompts) == rounded.generate(prompts, NEW_TOKENS)


def keras_gemma_ft(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "keras_gemma_ft", *arguments], check=True, cwd=ROOT)
