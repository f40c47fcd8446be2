"""tokenizer.json against SentencePiece, id by id, and its loading in transformers."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export import tokenizer as hf_tokenizer

# Several scripts, characters without a piece, ties between two joins, pieces that are found before joining.
FRAGMENTS = [
    " ",
    "  ",
    "   ",
    "\t",
    "a",
    "na",
    "ba",
    "the",
    " the",
    "ing",
    "123",
    "é",
    "e\u0301",
    "😀",
    "你好",
]
FRAGMENTS += ["\u200d", "\x00", "▁", "<", "<|", "|>", "\n", "\n\n\n", "<b>", "</b>", "<|turn>", "<turn|>"]


def _fuzz(count: int) -> list[str]:
    rng = random.Random(0)
    mixed = ["".join(rng.choices(FRAGMENTS, k=rng.randint(1, 40))) for _ in range(count)]
    return mixed + [
        text * repeat for text in ("a", "na", "aba", " ", "\n", "=", "0") for repeat in (3, 17, 64)
    ]


def _assert_same_ids(model: bytes, texts: list[str]) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = hf_tokenizer.from_sentencepiece(model)
    for text in texts:
        expected = reference.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        assert ours.decode(expected, skip_special_tokens=False) == reference.decode(expected), text


def test_ids_equal_sentencepiece_on_a_small_vocabulary(small_model):
    _assert_same_ids(small_model, ["the bathe singing nothing, banana bandana", *_fuzz(1000)])


def test_ids_equal_sentencepiece_on_gemmas_vocabulary(shared: Path):
    questions = (shared / "datasets" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    code = Path(json.__file__).read_text(encoding="utf-8")
    model = (shared / "tokenizer" / "gemma4.model").read_bytes()
    _assert_same_ids(model, [*questions[:300], code, *_fuzz(1000)])


def test_the_comparison_notices_the_order_of_merges(small_model):
    from tokenizers import Tokenizer

    ours = hf_tokenizer.from_sentencepiece(small_model)
    reordered = json.loads(ours.to_str())
    reordered["model"]["merges"].reverse()
    broken = Tokenizer.from_str(json.dumps(reordered))
    assert any(broken.encode(text).ids != ours.encode(text).ids for text in _fuzz(100))


@pytest.mark.parametrize("variant", ["edge", "large"])
def test_transformers_loads_it_offline_with_one_bos(small_model, tmp_path, variant):
    from transformers import AutoTokenizer, GenerationConfig

    hf_tokenizer.write_tokenizer(tmp_path, small_model, variant, max_length=4096)
    reference = sentencepiece.SentencePieceProcessor(model_proto=small_model)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    bos, turn = (reference.piece_to_id(piece) for piece in ("<bos>", "<|turn>"))

    assert loaded("the thing").input_ids == [bos, *reference.encode("the thing")]
    prompt = loaded.apply_chat_template(
        [{"role": "user", "content": "sing"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt.count(bos) == 1
    assert prompt[:2] == [bos, turn]
    assert (loaded.sot_token, loaded.eot_token, loaded.model_max_length) == ("<|turn>", "<turn|>", 4096)
    assert set(loaded.all_special_tokens) == {
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "<mask>",
        "<|tool>",
        "<tool|>",
        "<|tool_response>",
        "<|turn>",
        "<turn|>",
        '<|"|>',
    }
    assert loaded.decode(prompt, skip_special_tokens=True).startswith("user\nsing\nmodel\n")
    stops = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    assert stops == [reference.piece_to_id(piece) for piece in ("<eos>", "<turn|>", "<|tool_response>")]


def test_real_stop_ids_and_sampling(shared: Path):
    model = (shared / "tokenizer" / "gemma4.model").read_bytes()
    vocabulary = hf_tokenizer.from_sentencepiece(model).get_vocab()
    assert hf_tokenizer.generation_config(vocabulary) == {
        "bos_token_id": 2,
        "eos_token_id": [1, 106, 50],
        "pad_token_id": 0,
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }


def test_other_models_are_refused(small_model):
    with pytest.raises(UserError, match="no SentencePiece model"):
        hf_tokenizer.from_sentencepiece(b"not a model", where="there.model")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(small_model)
    proto.normalizer_spec.add_dummy_prefix = True
    with pytest.raises(UserError, match="published with Gemma 4"):
        hf_tokenizer.from_sentencepiece(proto.SerializeToString())


def test_copying_leaves_the_files_unchanged(small_model, tmp_path):
    source, target = tmp_path / "preset", tmp_path / "export"
    source.mkdir()
    target.mkdir()
    hf_tokenizer.write_tokenizer(source, small_model, "edge", max_length=64)
    (source / "model.safetensors").write_bytes(b"weights stay")
    names = hf_tokenizer.copy_tokenizer(source, target)
    assert (
        set(names)
        == {path.name for path in target.iterdir()}
        == {
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        }
    )
    assert all((source / name).read_bytes() == (target / name).read_bytes() for name in names)
