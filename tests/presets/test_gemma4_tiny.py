"""The embedded preset: a whole Gemma 4 of E2B's kind that is small, complete, and has learned its corpus."""

import jax
import numpy as np
import pytest

from keras_gemma_ft.data.tokenizer import Tokenizer
from keras_gemma_ft.export.tokenizer import write_tokenizer
from keras_gemma_ft.model import gemma4, loading
from keras_gemma_ft.presets import embedded_presets, resolve_preset
from pretrain.corpus import documents
from pretrain.pretrain import LENGTH, mean_loss
from pretrain.tokens import encode_documents, pack

UNSEEN = 10**9  # a document's number that training, at 7 million documents, did not reach


@pytest.fixture(scope="module")
def source():
    return loading.open_source(resolve_preset("gemma4_tiny"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_preset("gemma4_tiny")


def test_it_is_small_and_has_every_part_of_the_e_kind(source):
    directory = embedded_presets()["gemma4_tiny"]
    assert sum(path.stat().st_size for path in directory.iterdir()) <= 8 * 10**6
    config = source.config
    assert source.dtype == "bfloat16"
    assert {stage.name: (stage.groups, stage.locals_per_group) for stage in config.stages} == {
        "own": (2, 1),
        "shared": (1, 1),
    }
    assert config.variant == "edge"
    assert config.use_double_wide_mlp
    assert config.final_logit_softcapping == 30
    assert config.kind("own", "global").head_dim == 2 * config.kind("own", "local").head_dim
    assert config.sliding_window < 64


def test_its_vocabulary_has_gemma_4s_markers(source, tokenizer):
    assert tokenizer.vocabulary_size == source.config.vocab_size
    assert tokenizer.pieces[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    markers = '<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|> <|think|>'
    for marker in [*markers.split(), "<|channel>", "<channel|>", "<|turn>", "<turn|>", "\n", "\n\n", "▁▁"]:
        assert tokenizer.encode(marker.replace("▁", " ")) == [tokenizer.id_of(marker)]
    for text in ("  two  spaces\n\n\nÄpfel 你好 🙂 12345", "user", "x" * 50, ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [len(tokenizer.encode(role)) for role in ("system", "user", "model")] == [1, 1, 1]


def test_its_tokenizer_files_are_those_that_exports_write(tmp_path, tokenizer, source):
    """If this fails, the exporter has changed: write the preset's files again with `write_tokenizer`."""
    write_tokenizer(tmp_path, tokenizer.serialized, "edge", source.config.max_position_embeddings)
    for path in tmp_path.iterdir():
        assert (tokenizer.path.parent / path.name).read_bytes() == path.read_bytes(), path.name


def test_it_has_learned_its_corpus(source, tokenizer):
    """On documents that it has not seen; the last training loss was 0.738, an untrained model's is 8.3."""
    encoded = encode_documents(list(documents(UNSEEN, UNSEEN + 60)), tokenizer)
    rows = pack(encoded, LENGTH, tokenizer.pad)
    params = dict(loading.load(source, "float32"))
    loss = jax.jit(mean_loss, static_argnums=1)(params, source.config, rows)
    assert 0.6 < float(loss) < 0.85


def test_it_answers(source, tokenizer):
    from keras_gemma_ft.data.template import encode

    asked = {
        "What is the capital of Norway?": "Oslo",
        "What is the opposite of hot?": "cold",
        "What do bees make?": "Honey",
    }
    params = dict(loading.load(source, "float32"))
    settings = gemma4.Settings(dtype="float32", remat="none")
    for question, answer in asked.items():
        turns = [{"role": "user", "content": question}, {"role": "model", "content": answer}]
        token_ids, mask = encode(turns, tokenizer)
        rows = token_ids[None], np.arange(len(token_ids))[None], np.ones((1, len(token_ids)), np.int32)
        hidden = gemma4.hidden_states(params, source.config, *rows, settings=settings)
        best = np.asarray(gemma4.logits(params, source.config, hidden)[0].argmax(-1))
        supervised = mask[1:]
        said = tokenizer.decode(best[:-1][supervised])
        assert said in (f"{answer}<turn|>", f"{answer}.", f"{answer}.<turn|>"), question
