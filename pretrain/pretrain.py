"""Trains `gemma4_tiny` from nothing on the corpus, and writes it as a preset.

    python -m pretrain.vocabulary build/gemma4_tiny
    python -m pretrain.pretrain build/gemma4_tiny --minutes=4 --processes=15      # a GPU
    python -m pretrain.pretrain build/gemma4_tiny --minutes=600 --rows=16         # a CPU

New text is made while the model trains; no document is seen twice. The learning rate falls with the time that
is used up, or with the steps if `--steps` is given. Texts on which the model will be measured are kept out
with `--exclude`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.export.shards import TensorSpec, write_file
from keras_gemma_ft.export.tokenizer import write_tokenizer
from keras_gemma_ft.model import gemma4
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.weights import table
from pretrain.architecture import tiny
from pretrain.exclusion import Exclusion, read_prompts
from pretrain.tokens import rows

Params = dict[str, jax.Array]

LENGTH = 256  # tokens a row
PEAK = 3e-3
WARMUP = 0.03  # of the training
# Rows are short: dense attention is the quickest.
SETTINGS = gemma4.Settings(dtype=jnp.float32, remat="none", implementation="reference")
COMPILING = 2  # steps that are not timed
DOCUMENTS = 2**40  # more than can be read
# The instructions with which evaluation measures forgetting.
GENERAL = Path(__file__).parents[1] / "keras_gemma_ft/evaluate/general.jsonl"


def initial(config: Gemma4Config, seed: int = 0) -> Params:
    """Random float32 weights: every activation starts with a variance of about one."""
    random = np.random.default_rng(seed)
    params = {}
    for name, weight in table(config).items():
        shape = weight.stacked_shape
        if weight.use == "small":
            scale = 1.0
            if weight.role in ("q_norm", "k_norm"):
                scale = weight.shape[0] ** -0.25  # q·k is not divided by anything: start with a soft softmax
            value = np.full(shape, scale)
        elif name == "embed_tokens_per_layer":
            value = random.normal(size=shape) * config.hidden_size_per_layer_input**-0.5
        else:
            value = random.normal(size=shape) * shape[-1] ** -0.5
        params[name] = jnp.asarray(value, jnp.float32)
    return params


def complete(tokens: jax.Array, bos: int, pad: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Token ids, positions and segment ids, int32 [rows, length], of rows as `tokens.pack` makes them."""
    token_ids = tokens.astype(jnp.int32)
    starts = token_ids == bos
    place = jnp.arange(token_ids.shape[1])[None]
    positions = place - jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
    return token_ids, positions, jnp.where(token_ids == pad, 0, jnp.cumsum(starts, axis=1))


def mean_loss(params: Params, config: Gemma4Config, tokens: jax.Array) -> jax.Array:
    """Mean loss in nats of every token but the first of each document."""
    token_ids, positions, segments = complete(tokens, config.bos_token_id, config.pad_token_id)
    hidden = gemma4.hidden_states(params, config, token_ids, positions, segments, settings=SETTINGS)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        gemma4.logits(params, config, hidden[:, :-1]), token_ids[:, 1:]
    )
    counts = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    return jnp.sum(losses * counts) / jnp.sum(counts)


def optimizer(params: Params, config: Gemma4Config) -> optax.GradientTransformation:
    """AdamW for a learning rate of one; the caller scales what it gives."""
    matrices = {name: weight.use == "matrix" for name, weight in table(config).items() if name in params}
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.97),
        optax.add_decayed_weights(0.1, mask=matrices),
    )


@partial(jax.jit, static_argnames=("config",), donate_argnames=("params", "state"))
def step(
    params: Params, state: Any, tokens: jax.Array, learning_rate: jax.Array, config: Gemma4Config
) -> tuple[Params, Any, jax.Array]:
    """One update on rows of tokens."""
    loss, gradients = jax.value_and_grad(mean_loss)(params, config, tokens)
    updates, state = optimizer(params, config).update(gradients, state, params)
    return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), state, loss


def learning_rate(done: float) -> float:
    """Warm-up, then a cosine to a hundredth of the peak.

    Args:
        done: Share of the training that lies behind, from 0 to 1.
    """
    if done < WARMUP:
        return PEAK * done / WARMUP
    return PEAK * (0.01 + 0.99 * (1 + math.cos(math.pi * (done - WARMUP) / (1 - WARMUP))) / 2)


def batches(
    vocabulary: Path, count: int, processes: int, excluded: Exclusion, first: int = 0
) -> Iterator[np.ndarray]:
    """uint16 [count, LENGTH] rows, the rows of some chunks of documents mixed."""
    random = np.random.default_rng(first)
    kept = np.zeros((0, LENGTH), np.uint16)
    for made in rows(vocabulary, LENGTH, first, DOCUMENTS, processes, excluded):
        kept = np.concatenate([kept, made])
        if len(kept) < 4 * count:
            continue
        kept = random.permutation(kept)
        while len(kept) >= 2 * count:
            yield kept[:count]
            kept = kept[count:]


def write_preset(params: Params, config: Gemma4Config, directory: Path) -> None:
    """Makes a whole Hugging Face directory of one that holds tokenizer.model; weights are bfloat16."""
    specs, values = [], {}
    for name, weight in table(config).items():
        stacked = np.asarray(params[name])
        for index, hf_name in weight.hf_names():
            specs.append(TensorSpec(f"model.{hf_name}", weight.shape, "bfloat16"))
            values[specs[-1].name] = stacked[index]
    write_file(directory / "model.safetensors", specs, lambda spec: values[spec.name])
    stored = {**config.to_hf(), "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    model = (directory / "tokenizer.model").read_bytes()
    write_tokenizer(directory, model, config.variant, config.max_position_embeddings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds tokenizer.model; the preset is written here")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of --minutes")
    parser.add_argument("--rows", type=int, default=128, help="of 256 tokens a step")
    parser.add_argument("--processes", type=int, default=2, help="that make text")
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="CSV or JSONL files of prompts")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_file(options.directory / "tokenizer.model")
    config = tiny(tokenizer.vocabulary_size)
    params = initial(config)
    state = optimizer(params, config).init(params)
    print(f"{sum(value.size for value in params.values()):,} parameters on {jax.devices()[0]}", flush=True)

    excluded = Exclusion(read_prompts([GENERAL, *options.exclude]))
    print(f"{len(excluded):,} texts are kept out of the corpus", flush=True)
    feed = batches(options.directory / "tokenizer.model", options.rows, options.processes, excluded)

    began, losses, done = time.monotonic(), [], 0.0
    for number, tokens in enumerate(feed, 1):
        params, state, loss = step(params, state, tokens, learning_rate(done), config)
        losses.append(loss)
        if number <= COMPILING:
            loss.block_until_ready()
            began = time.monotonic()
        losses[-min(3, len(losses))].block_until_ready()  # the host runs two steps ahead, no more
        seconds = time.monotonic() - began
        done = number / options.steps if options.steps else seconds / (60 * options.minutes)
        if number % 200 == 0 or done >= 1:
            speed = options.rows * LENGTH * (number - COMPILING) / max(seconds, 1e-9)
            mean = float(np.mean([float(value) for value in losses]))
            print(f"step {number} ({done:.0%}): loss {mean:.4f}, {speed:,.0f} tokens/s", flush=True)
            losses = []
        if number % 2000 == 0 or done >= 1:
            write_preset(params, config, options.directory)
        if done >= 1:
            return


if __name__ == "__main__":
    main()
