"""Generation with a cache against a whole forward pass for each token, and against transformers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoders import FLOAT32, Decoder, logits, random_adapters
from small_models import KINDS

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.model import decoding
from keras_gemma_ft.model.config import Gemma4Config
from keras_gemma_ft.model.decoding import Sampling
from keras_gemma_ft.model.generation import generate_tokens, stream_tokens
from keras_gemma_ft.model.loading import RandomSource, load
from keras_gemma_ft.model.weights import table

# Prompts shorter and longer than the window of 8.
LENGTHS = (1, 3, 7, 8, 9, 20, 33, 40)
NEW = 20
# As generation sets it, so that its programs are those of the tests.
NO_REMAT = dataclasses.replace(FLOAT32, remat="none")


# With these norms larger, layers outweigh the token that they are given: else every answer repeats one token.
LIVELY = ("post_attention_layernorm", "post_feedforward_layernorm")


@pytest.fixture(scope="module")
def lively(decoder) -> Callable[[str], Decoder]:
    """Gives our decoder of a kind, one that says something."""

    @functools.cache
    def make(kind: str) -> Decoder:
        small = decoder(kind)
        return Decoder(
            small.config,
            {
                name: 10 * value if name.rpartition("/")[2] in LIVELY else value
                for name, value in small.params.items()
            },
        )

    return make


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(4, 96, length).tolist() for length in lengths]


def run(small: Any, given: list[list[int]], new: int = NEW, **options: Any) -> list[list[int]]:
    options.setdefault("settings", FLOAT32)
    return generate_tokens(small.params, small.config, given, new, **options)


def padded(given: list[list[int]], length: int = 64) -> tuple[Any, Any, Any]:
    """Token ids [rows, length], lengths and random keys [rows]."""
    ids = np.zeros((len(given), length), np.int32)
    for row, prompt in zip(ids, given, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in given], np.int32)
    return ids, lengths, jax.random.split(jax.random.key(0), len(given))


def chosen_by_forward_pass(
    small: Any, given: list[list[int]], found: list[list[int]], **options: Any
) -> tuple[list[list[int]], float]:
    """The greedy choice after each prefix of prompt and answer, without a cache, all in one forward pass.

    If each equals the answer's next token, the answer is the one of a forward pass for each token. Also gives
    the smallest lead of a choice over the next best.
    """
    rows = [prompt + tokens for prompt, tokens in zip(given, found, strict=True)]
    ids, lengths, _ = padded(rows)
    found_logits = logits(small, ids, None, np.arange(64) < lengths[:, None], **options)
    chosen, lead = [], np.inf
    for of_row, prompt, row in zip(found_logits, given, rows, strict=True):
        of_answer = of_row[len(prompt) - 1 : len(row) - 1]
        chosen.append(of_answer.argmax(-1).tolist())
        best = np.sort(of_answer, axis=-1)
        lead = min(lead, (best[:, -1] - best[:, -2]).min())
    return chosen, float(lead)


@pytest.fixture(scope="module")
def greedy(lively) -> Callable[[str], list[list[int]]]:
    return functools.cache(lambda kind: run(lively(kind), prompts()))


# --- Greedy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_whole_forward_passes(kind, lively, greedy):
    found = greedy(kind)
    expected, lead = chosen_by_forward_pass(lively(kind), prompts(), found)
    assert lead > 1e-4, "too near a tie to compare: change the seed"
    assert found == expected
    assert {len(tokens) for tokens in found} == {NEW}
    assert np.mean([len(set(tokens)) for tokens in found]) > 8, "too dull to tell anything"


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_transformers(kind, torch_model, greedy):
    import torch

    theirs = torch_model(kind)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.split(".")[-2] in LIVELY:
                weight *= 10
    for place in (0, 4, 7):
        prompt, tokens = prompts()[place], greedy(kind)[place]
        ids = torch.tensor([prompt])
        out = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens == out[0, len(prompt) :].tolist()


def test_quantized_weights_and_adapters(lively):
    plain = lively("31b")
    quantization = {"weights": "nf4", "embedding": "int8"}
    params = dict(load(RandomSource(plain.config, dtype="float32"), "float32", quantization))
    # The random source's weights are small: larger norms give the logits some spread.
    params["norm"] *= 30
    adapters = random_adapters(plain.config)
    small = Decoder(plain.config, params)
    options = {"settings": dataclasses.replace(FLOAT32, lora_scale=2.0), "adapters": adapters}
    found = run(small, prompts(), **options)
    expected, lead = chosen_by_forward_pass(small, prompts(), found, **options)
    assert lead > 1e-4, "too near a tie to compare: change the seed"
    assert found == expected


def test_bfloat16_chooses_what_is_best_but_for_its_rounding(lively):
    small = lively("e2b")
    half = dataclasses.replace(FLOAT32, dtype=jnp.bfloat16)
    given = prompts()
    found = run(small, given, settings=half)
    ids, lengths, _ = padded([prompt + tokens for prompt, tokens in zip(given, found, strict=True)])
    segments = np.arange(64) < lengths[:, None]
    rounded, exact = (logits(small, ids, None, segments, settings=how) for how in (half, FLOAT32))
    for place, (prompt, tokens) in enumerate(zip(given, found, strict=True)):
        span = slice(len(prompt) - 1, len(prompt) + NEW - 1)
        # Decoding rounds in other places than a whole pass, each about as far off as the pass is.
        error = np.abs(rounded[place, span] - exact[place, span]).max(-1)
        chosen = np.take_along_axis(exact[place, span], np.array(tokens)[:, None], -1)[:, 0]
        assert np.all(chosen >= exact[place, span].max(-1) - 4 * error)


# --- Batches, stops, places ---------------------------------------------------------------------------------


def test_an_answer_does_not_depend_on_its_batch(lively, greedy):
    small, expected = lively("31b"), greedy("31b")
    assert run(small, prompts()[::-1]) == expected[::-1]
    assert run(small, prompts()[2:7]) == expected[2:7]
    alone = stream_tokens(small.params, small.config, prompts()[-1], NEW, settings=FLOAT32)
    assert list(alone) == expected[-1]


def test_answers_end_with_a_stop_token_and_decoding_with_the_last_of_them(lively, greedy):
    small, expected = lively("31b"), greedy("31b")
    stops = tuple(sorted({tokens[5] for tokens in expected}))
    ends = [min(place for place, token in enumerate(tokens, 1) if token in stops) for tokens in expected]
    assert len(set(ends)) > 2
    found = run(small, prompts(), stop_ids=stops)
    assert found == [tokens[:end] for tokens, end in zip(expected, ends, strict=True)]

    plan = decoding.Plan(small.config, NO_REMAT, Sampling(), stops, 32)
    state = decoding.prefill(plan, small.params, None, *padded(prompts()))
    cache = state.cache["own/global"][0]
    state = decoding.extend(plan, state, small.params, None, 32)
    assert state.answer_length == max(ends)
    assert cache.is_deleted(), "the cache must be given over, not copied"


def test_shorter_answers_are_beginnings_of_longer_ones(lively, greedy):
    assert run(lively("31b"), prompts(), new=17) == [tokens[:17] for tokens in greedy("31b")]


def test_programs_are_few_however_many_prompts_there_are(lively, greedy):
    small = lively("31b")
    greedy("31b")
    before = decoding.prefill._cache_size(), decoding.extend._cache_size()
    rng = np.random.default_rng(2)
    given = prompts(tuple(rng.integers(1, 128, 50)))
    for number in (50, 23, 5):
        run(small, given[:number], new=17, batch_size=8, seed=number)
    # Prompts of at most 128 tokens; there was a program for those of at most 64.
    after = decoding.prefill._cache_size(), decoding.extend._cache_size()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)


# --- Memory -------------------------------------------------------------------------------------------------


def test_only_the_last_logits_exist_whatever_the_vocabulary():
    rows, length, vocabulary = 16, 64, 262_144
    sizes = {"vocab_size": vocabulary, "vocab_size_per_layer_input": vocabulary}
    config = Gemma4Config.from_hf({**KINDS["e2b"], **sizes})
    params = {
        name: jax.ShapeDtypeStruct(weight.stacked_shape, jnp.float32)
        for name, weight in table(config).items()
    }
    plan = decoding.Plan(config, NO_REMAT, Sampling(), (1, 106, 50), 16)
    given = params, None, *jax.eval_shape(lambda: padded([[1]] * rows, length))
    state = jax.eval_shape(functools.partial(decoding.prefill, plan), *given)
    of_last_tokens = 4 * rows * vocabulary
    for lowered in (
        decoding.prefill.lower(plan, *given),
        decoding.extend.lower(plan, state, params, None, jnp.int32(16)),
    ):
        memory = lowered.compile().memory_analysis()
        # All tokens of the prompts would take 64 times that.
        assert memory.temp_size_in_bytes < 2 * of_last_tokens


# --- Sampling -----------------------------------------------------------------------------------------------


def test_sampling_is_repeated_by_its_seed_and_place(lively):
    small = lively("31b")
    sampling = Sampling(1.0, top_k=40, top_p=0.95)
    found = run(small, prompts(), sampling=sampling, seed=3)
    assert run(small, prompts()[:5], sampling=sampling, seed=3) == found[:5]
    assert run(small, prompts(), sampling=sampling, seed=4) != found
    first, second, *_ = run(small, [prompts()[3]] * 8, sampling=sampling, seed=3)
    assert first != second
    assert second != found[1]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), [0.4, 0.3, 0.15, 0.1, 0.05]),
        (Sampling(1.0, top_k=2), [0.4, 0.3, 0, 0, 0]),
        # 0.4 + 0.3 = 0.7 fall short of the share, and the next one reaches it.
        (Sampling(1.0, top_p=0.8), [0.4, 0.3, 0.15, 0, 0]),
        (Sampling(1.0, top_p=0.1), [0.4, 0, 0, 0, 0]),
        # Of the three most probable ones, the first two have 0.82.
        (Sampling(1.0, top_k=3, top_p=0.8), [0.4, 0.3, 0, 0, 0]),
        (Sampling(0.5), [0.4**2, 0.3**2, 0.15**2, 0.1**2, 0.05**2]),
        (Sampling(0.0, top_k=3), [1, 0, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampling, kept):
    order = np.array([3, 0, 4, 1, 2])
    shares, expected = np.zeros(5), np.zeros(5)
    shares[order] = [0.4, 0.3, 0.15, 0.1, 0.05]
    expected[order] = np.array(kept) / np.sum(kept)
    draws = 20_000
    logits = jnp.broadcast_to(jnp.log(shares) + 3, (draws, 5))
    tokens = decoding.sample(logits, sampling, jax.random.split(jax.random.key(0), draws))
    counts = np.bincount(np.asarray(tokens), minlength=5)
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts - draws * expected) <= 5 * np.sqrt(draws * expected * (1 - expected)))


# --- Faults -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": [[2], []]}, "prompt 2: has no token"),
        ({"given": [[2] * 250]}, "prompt 1: has 250 tokens, and 20 new ones do not fit"),
        ({"new": 0}, "max_new_tokens: 0 tokens"),
        ({"batch_size": 0}, "batch_size: 0 rows"),
    ],
)
def test_faults_are_named(options, message, lively):
    with pytest.raises(UserError, match=message):
        run(lively("31b"), **{"given": prompts(), **options})


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_outside_its_range_is_named(options):
    (name,) = options
    with pytest.raises(UserError, match=f"^{name}: "):
        Sampling(**options)
