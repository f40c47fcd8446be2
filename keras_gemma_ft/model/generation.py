"""Generation: prompts in, answers out, in batches of few shapes.

Prompts are sorted by length and padded to powers of two, so that a handful of programs is compiled however
many prompts there are. Answers come back in the order of the prompts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import jax
import numpy as np

from keras_gemma_ft.data.encoding import ScriptEncoder
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.template import Template
from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.decoding import Plan, Sampling, State, extend, prefill
from keras_gemma_ft.model.gemma4 import Params, Settings
from keras_gemma_ft.model.projections import Adapters

BATCH_SIZE = 32
Prompt = str | Sequence[Mapping[str, Any]] | Conversation
"""A user's message; messages that an answer is wanted to; or a conversation, for its tools."""

_SHORTEST_PROMPT, _SHORTEST_ANSWER = 64, 16
# What a batch's prompts may have together, padding included: activations of the prefill grow with it.
_PROMPT_TOKENS = 32_768


class Model(Protocol):
    """What generation asks of a model, as `GemmaCausalLM` has it."""

    config: Gemma4Config
    settings: Settings
    tokenizer: Any

    def params(self) -> Params: ...

    def adapters(self) -> Adapters | None: ...


# --- Texts --------------------------------------------------------------------------------------------------


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    stop_ids: Sequence[int] | None = None,
    template: Template | None = None,
    tell: Callable[[int], object] | None = None,
) -> Any:
    """Answers to prompts, without the tokens that ended them.

    Args:
        model: With its vocabulary.
        prompts: Several, or one.
        max_new_tokens: Tokens after which an answer ends unless it has stopped.
        temperature, top_k, top_p: See `Sampling`; the default is greedy.
        seed: With a prompt's place among `prompts` it determines the draws.
        batch_size: Rows at once.
        stop_ids: Tokens that end an answer; None: the vocabulary's.
        template: How conversations are laid out; None: as published for the model.
        tell: Given the number of answers of each batch when it is done.

    Returns:
        A list of strings in the order of the prompts; for one prompt, a string.

    Raises:
        UserError: The model has no vocabulary, or an argument does not fit.
    """
    one = isinstance(prompts, (str, Conversation)) or (bool(prompts) and isinstance(prompts[0], Mapping))
    tokenizer = _tokenizer(model)
    stop_ids = tuple(tokenizer.stop_ids if stop_ids is None else stop_ids)
    answers = generate_tokens(
        model.params(),
        model.config,
        _encode(cast(list[Prompt], [prompts] if one else prompts), model, template),
        max_new_tokens,
        settings=model.settings,
        adapters=model.adapters(),
        stop_ids=stop_ids,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        batch_size=batch_size,
        tell=tell,
    )
    texts = [tokenizer.decode(ids[:-1] if ids[-1] in stop_ids else ids) for ids in answers]
    return texts[0] if one else texts


def stream(
    model: Model,
    prompt: Prompt,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """One answer in pieces, as its tokens come; arguments as for `generate`, and together the same text."""
    tokenizer = _tokenizer(model)
    text = tokenizer.stream()
    tokens = stream_tokens(
        model.params(),
        model.config,
        _encode([prompt], model)[0],
        max_new_tokens,
        settings=model.settings,
        adapters=model.adapters(),
        stop_ids=tokenizer.stop_ids,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
    )
    for token in tokens:
        if token not in tokenizer.stop_ids:
            yield text.put(token)
    yield text.end()


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise UserError(
            "the model has no vocabulary",
            where="generate",
            remedy="load it from a preset, or use keras_gemma_ft.model.generation.generate_tokens.",
        )
    return model.tokenizer


def _encode(prompts: Sequence[Prompt], model: Model, template: Template | None = None) -> list[np.ndarray]:
    template = template or Template(model.config.variant)  # type: ignore[arg-type]
    scripts = [
        template.script(*_messages_and_tools(prompt), add_generation_prompt=True) for prompt in prompts
    ]
    encoded = ScriptEncoder(_tokenizer(model)).encode(scripts)
    return np.split(encoded.token_ids, encoded.offsets[1:-1]) if scripts else []


def _messages_and_tools(prompt: Prompt) -> tuple[Sequence[Mapping[str, Any]], Any]:
    if isinstance(prompt, Conversation):
        return prompt.messages, prompt.tools
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, None


# --- Tokens -------------------------------------------------------------------------------------------------


def generate_tokens(
    params: Params,
    config: Gemma4Config,
    prompts: Sequence[Sequence[int] | np.ndarray],
    max_new_tokens: int,
    *,
    settings: Settings,
    adapters: Adapters | None = None,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    tell: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """Answers in tokens, each with the token that ended it.

    Programs are compiled for each power of two that prompts are padded to, and once more where `batch_size`
    is not reached; and anew for another `sampling`, `settings`, or power of two above `max_new_tokens`.

    Args:
        params: The weights.
        config: Of the decoder.
        prompts: Token ids.
        max_new_tokens: Tokens after which an answer ends unless it has stopped.
        settings: How the decoder is computed.
        adapters: LoRA factors.
        stop_ids: Tokens that end an answer.
        sampling: How tokens are chosen; None: greedily.
        seed: With a prompt's place among `prompts` it determines the draws.
        batch_size: Rows at once at most; fewer where prompts are long.
        tell: Given the number of answers of each batch when it is done.

    Raises:
        UserError: A prompt is empty, or longer than the model can read; an argument is out of range.
    """
    plan = _plan(config, settings, sampling, stop_ids, max_new_tokens)
    for number, prompt in enumerate(prompts, 1):
        _check(len(prompt), max_new_tokens, config, f"prompt {number}")
    if batch_size < 1:
        raise UserError(f"{batch_size!r} rows are no batch", where="batch_size", remedy="choose 1 or more.")
    left = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    answers: dict[int, list[int]] = {}
    # The longest first, so that a lack of memory shows at once.
    while left:
        length = _power_of_two(len(prompts[left[0]]), _SHORTEST_PROMPT)
        rows = min(batch_size, max(1, _PROMPT_TOKENS // length), _power_of_two(len(prompts)))
        places, left = left[:rows], left[rows:]
        state = _begin(plan, params, adapters, prompts, places, (rows, length), seed)
        tokens = np.asarray(extend(plan, state, params, adapters, max_new_tokens).tokens)
        for place, row in zip(places, tokens, strict=False):
            answers[place] = _until_stop(row[:max_new_tokens].tolist(), plan.stop_ids)
        if tell is not None:
            tell(len(places))
    return [answers[place] for place in range(len(prompts))]


def stream_tokens(
    params: Params,
    config: Gemma4Config,
    prompt: Sequence[int] | np.ndarray,
    max_new_tokens: int,
    *,
    settings: Settings,
    adapters: Adapters | None = None,
    stop_ids: Sequence[int] = (),
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """One answer token by token, the one that ends it included: what `generate_tokens` gives for it alone."""
    plan = _plan(config, settings, sampling, stop_ids, max_new_tokens)
    _check(len(prompt), max_new_tokens, config, "prompt")
    shape = 1, _power_of_two(len(prompt), _SHORTEST_PROMPT)
    state = _begin(plan, params, adapters, [prompt], [0], shape, seed)
    for count in range(1, max_new_tokens + 1):
        if count > 1:
            state = extend(plan, state, params, adapters, count)
        token = int(state.tokens[0, count - 1])
        yield token
        if token in plan.stop_ids:
            return


def _plan(
    config: Gemma4Config,
    settings: Settings,
    sampling: Sampling | None,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> Plan:
    if max_new_tokens < 1:
        raise UserError(
            f"{max_new_tokens!r} tokens are no answer", where="max_new_tokens", remedy="choose 1 or more."
        )
    # Nothing is differentiated, and what training is set to must not compile another program.
    settings = dataclasses.replace(settings, remat="none", unroll=False, lora_dropout=0.0)
    room = _power_of_two(max_new_tokens, _SHORTEST_ANSWER)
    return Plan(config, settings, sampling or Sampling(), tuple(sorted(set(stop_ids))), room)


def _begin(
    plan: Plan,
    params: Params,
    adapters: Adapters | None,
    prompts: Sequence[Sequence[int] | np.ndarray],
    places: Sequence[int],
    shape: tuple[int, int],
    seed: int,
) -> State:
    """Prefills a batch [rows, length] with the prompts at `places`; what is left of it is filled up."""
    token_ids, lengths = np.zeros(shape, np.int32), np.zeros(shape[0], np.int32)
    for row, place in enumerate(places):
        lengths[row] = len(prompts[place])
        token_ids[row, : lengths[row]] = prompts[place]
    numbers = np.zeros(shape[0], np.uint32)
    numbers[: len(places)] = places
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), numbers)
    return prefill(plan, params, adapters, token_ids, lengths, keys)


def _check(length: int, max_new_tokens: int, config: Gemma4Config, where: str) -> None:
    if length == 0:
        raise UserError("has no token", where=where, remedy="start it with <bos> at least.")
    if length + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"has {length:,} tokens, and {max_new_tokens:,} new ones do not fit behind them: the model reads "
            f"{config.max_position_embeddings:,}",
            where=where,
            remedy="shorten it, or lower max_new_tokens.",
        )


def _until_stop(tokens: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    end = next((place for place, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))
    return tokens[:end]


def _power_of_two(number: int, least: int = 1) -> int:
    """The smallest power of two that is not below."""
    return max(least, 1 << (number - 1).bit_length())
