"""The same training step as benchmarks/step.py, in transformers and PEFT: what ours is compared with.

    python benchmarks/peft_step.py --model=e4b --micro-batch=2

Takes the arguments of step.py and prints one JSON object with the same names. Shapes, packed rows, LoRA and
optimizer are the same; weights are random. Experts and embeddings stay in bfloat16 whatever --quantization
says, since bitsandbytes replaces linear layers alone; all but `--remat=none` is gradient checkpointing. Only
steps count as memory, not making the model; norms and embeddings are not made float32, as PEFT's preparation
for QLoRA would do.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from step import (
    DROPOUT,
    LEARNING_RATE,
    RANK,
    arguments,
    decoder,
    described,
    figures,
    packed_batch,
    process_memory,
)

from keras_gemma_ft.model.weights import ALL_LINEAR


def measure(case: argparse.Namespace) -> dict[str, Any]:
    """Makes the model of a case and times its training step, in this process."""
    import peft
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.precision)
    config = decoder(case.model)
    model = _model(case, config, device, dtype)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, LEARNING_RATE, weight_decay=0.0, fused=device == "cuda")
    batch = packed_batch(config, case.rows, case.length)
    rows = {name: torch.from_numpy(value).to(device) for name, value in batch.items()}
    tokens, positions = rows["token_ids"].long(), rows["positions"].long()
    labels = tokens.where(rows["loss_mask"], -100)
    supervised = int(rows["loss_mask"].sum())
    size = case.micro_batch or case.rows

    def step() -> Any:
        total = torch.zeros((), device=device)
        for part in (slice(start, start + size) for start in range(0, case.rows, size)):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                # Without a mask, transformers sees from the positions where a row's examples begin.
                loss = model(
                    input_ids=tokens[part], position_ids=positions[part], labels=labels[part],
                    num_items_in_batch=supervised, use_cache=False,
                ).loss  # fmt: skip
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    losses = [float(step())]
    first = time.perf_counter()
    logged = [step() for _ in range(case.steps)]
    losses += [float(loss) for loss in logged]
    seconds = (time.perf_counter() - first) / case.steps
    peak = process_memory()
    if device == "cuda":
        peak = {"peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2), "peak_of": "device"}
    return {
        **described(case),
        **figures(case.rows * case.length, seconds, losses),
        **peak,
        "trainable_parameters": sum(parameter.numel() for parameter in adapters),
        "first_step_s": round(first - began, 1),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft)},
    }


def _model(case: argparse.Namespace, config: Any, device: str, dtype: Any) -> Any:
    import peft
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Gemma4ForCausalLM(Gemma4TextConfig(**config.to_hf()))
    torch.set_default_dtype(torch.float32)
    if case.method == "qlora":
        _quantize(model, device, dtype)
    if case.remat != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, lora_dropout=DROPOUT, target_modules=list(ALL_LINEAR)
    )
    return peft.get_peft_model(model, settings).train()


def _quantize(model: Any, device: str, dtype: Any) -> None:
    """Puts 4-bit modules in the place of linear ones, as transformers does when it loads a checkpoint."""
    import bitsandbytes
    import torch

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent, _, leaf = name.rpartition(".")
            with torch.device("meta"):
                new = bitsandbytes.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
            new.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", module=new
            ).to(device)
            setattr(model.get_submodule(parent), leaf, new)
    model.is_loaded_in_4bit = True


def main() -> None:
    case = arguments()
    if case.preset or case.method == "full":
        print("peft_step.py: give --model, and lora or qlora as --method", file=sys.stderr)
        raise SystemExit(2)
    print(json.dumps(measure(case)), flush=True)


if __name__ == "__main__":
    main()
