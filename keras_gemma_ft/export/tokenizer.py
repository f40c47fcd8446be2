"""A SentencePiece vocabulary as the files that Hugging Face tokenizers read, with the same ids.

SentencePiece's BPE joins, again and again, the adjacent pair whose union is the best-scored piece. Hugging
Face's BPE joins the pair that comes first in a list of merges. Listing every split of every piece, the
best-scored piece first, makes the two agree. Pieces that SentencePiece matches whole before any joining (its
user-defined symbols: `<|turn>`, runs of spaces and line breaks, HTML tags) become added tokens, which Hugging
Face also matches first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_gemma_ft.errors import UserError
from keras_gemma_ft.export.chat_template import chat_template
from keras_gemma_ft.json_files import write_json

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"
TURN_START, TURN_END = "<|turn>", "<turn|>"
STOP_PIECES = ("<eos>", TURN_END, "<|tool_response>")
PUBLISHED_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 64, "top_p": 0.95}

# The piece types of sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# What an HF directory's tokenizer consists of; copied unchanged when a preset is one.
_HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def from_sentencepiece(model: bytes, where: str = "tokenizer.model") -> tokenizers.Tokenizer:
    """Builds the Hugging Face tokenizer that gives the ids of a SentencePiece model.

    Encoding adds one `<bos>` unless told otherwise (`add_special_tokens=False`). Unlike SentencePiece, the
    text `<bos>`, `<eos>`, `<pad>` or `<unk>` encodes to that token: the chat template writes `<bos>` as text.

    Args:
        model: A serialized SentencePiece BPE model, with byte fallback and without normalization as Gemma's.
        where: How errors name the model.

    Raises:
        UserError: The model is of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = _parse(model, where)
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    unknown = next(piece for piece, _, kind in pieces if kind == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(pieces),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    # A run of spaces is sought after spaces became `▁`; all other whole pieces in the text as it came.
    tokenizer.add_tokens(
        [
            AddedToken(piece, normalized=SPACE in piece, special=_is_special(piece, kind))
            for piece, _, kind in pieces
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def write_tokenizer(directory: Path, model: bytes, variant: str, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

    Args:
        directory: An existing directory.
        model: A serialized SentencePiece model.
        variant: Which chat template: `edge` or `large`.
        max_length: Longest sequence the model was made for, in tokens.
    """
    tokenizer = from_sentencepiece(model)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    complete_tokenizer(directory, tokenizer.get_vocab(), variant, max_length)


def complete_tokenizer(directory: Path, vocabulary: Mapping[str, int], variant: str, max_length: int) -> None:
    """Writes what a directory with tokenizer.json lacks, and leaves what it has as it is.

    A base model's directory has no chat template, for example, and its generation stops at `<eos>` alone: a
    generation_config.json gets the ids that it lacks.

    Args:
        directory: An existing directory.
        vocabulary: Piece to id.
        variant, max_length: As for `write_tokenizer`.
    """
    settings = directory / "tokenizer_config.json"
    if not settings.is_file():
        write_json(settings, tokenizer_config(vocabulary, max_length))
    template = directory / "chat_template.jinja"
    if not template.is_file() and "chat_template" not in json.loads(settings.read_text(encoding="utf-8")):
        template.write_text(chat_template(variant), encoding="utf-8")
    generation = directory / "generation_config.json"
    ours = generation_config(vocabulary)
    theirs = json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else {}
    stops = theirs.get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [stops]
    missing = [stop for stop in ours["eos_token_id"] if stop not in stops]
    if missing:
        write_json(generation, {**(theirs or ours), "eos_token_id": stops + missing})


def copy_tokenizer(preset: Path, directory: Path) -> list[str]:
    """Copies the tokenizer files of an HF directory unchanged; returns the names of those it has."""
    names = [name for name in _HF_FILES if (preset / name).is_file()]
    for name in names:
        shutil.copyfile(preset / name, directory / name)
    return names


def tokenizer_config(vocabulary: Mapping[str, int], max_length: int) -> dict[str, Any]:
    """The contents of tokenizer_config.json for a vocabulary (piece to id).

    llama.cpp reads `sot_token` and `eot_token`: without them it splits the turn markers.
    """
    roles = {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "sot_token": TURN_START,
        "eot_token": TURN_END,
    }
    present = {role: piece for role, piece in roles.items() if piece in vocabulary}
    markers = [piece for piece in vocabulary if _is_marker(piece) and piece not in present.values()]
    return {
        "tokenizer_class": "GemmaTokenizer",
        **present,
        "additional_special_tokens": sorted(markers, key=vocabulary.__getitem__),
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
    }


def generation_config(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """The contents of generation_config.json: every id that ends an answer, and the published sampling."""
    return {
        "bos_token_id": vocabulary["<bos>"],
        "eos_token_id": [vocabulary[piece] for piece in STOP_PIECES if piece in vocabulary],
        "pad_token_id": vocabulary["<pad>"],
        **PUBLISHED_SAMPLING,
    }


def _parse(model: bytes, where: str) -> list[tuple[str, float, int]]:
    """(piece, score, type) of every id."""
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # its classes are made at run time, where mypy cannot see them
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(model)
    except Exception as error:  # protobuf's DecodeError; protobuf is sentencepiece's business, not ours
        raise UserError("this is no SentencePiece model", where=where) from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    gemma_like = (
        trainer.model_type == schema.TrainerSpec.BPE
        and trainer.byte_fallback
        and not normalizer.precompiled_charsmap
        and not normalizer.add_dummy_prefix
        and not normalizer.remove_extra_whitespaces
    )
    if not gemma_like:
        raise UserError(
            "tokenizer.json can be built from a BPE model with byte fallback and no normalization only",
            where=where,
            remedy="use the vocabulary that was published with Gemma 4.",
        )
    return [(piece.piece, piece.score, piece.type) for piece in proto.pieces]


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, best-scored piece first, then the longest left part.

    Runs of one character are user-defined, so Hugging Face needs no merges for them; llama.cpp, which seeks
    whole pieces before it turns spaces into `▁`, does.
    """
    joinable = {
        piece: score
        for piece, score, kind in pieces
        if kind == _NORMAL or (kind == _USER_DEFINED and len(set(piece)) == 1)
    }
    ranked = [
        (-score, -cut, cut - len(piece), (piece[:cut], piece[cut:]))
        for piece, score in joinable.items()
        for cut in range(1, len(piece))
        if piece[:cut] in joinable and piece[cut:] in joinable
    ]
    ranked.sort(key=lambda split: split[:3])
    return [pair for *_, pair in ranked]


def _is_special(piece: str, kind: int) -> bool:
    """Whether decoding for people leaves the piece out."""
    return kind in (_CONTROL, _UNKNOWN) or _is_marker(piece) or piece == "<mask>"


def _is_marker(piece: str) -> bool:
    """Whether it is one of Gemma 4's own markers: `<|turn>`, `<turn|>`, `<|image|>` and their like."""
    return piece.startswith("<") and piece.endswith(">") and ("<|" in piece or "|>" in piece)
