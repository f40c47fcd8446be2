"""Gemma 4's vocabulary: text to token ids and back, from a SentencePiece model or a tokenizer.json.

The ids of special tokens are looked up by piece, never assumed: the embedded tiny vocabulary has other ids
than the published one.

    tokenizer = Tokenizer.from_preset("gemma4_tiny")
    tokenizer.decode(tokenizer.encode("Hello!"))  # "Hello!"
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from keras_gemma_ft.data.script import check_encodable
from keras_gemma_ft.errors import UserError

SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>\Z")
# Where presets keep their vocabulary: KerasHub's place first, because a KerasHub directory may also hold a
# tokenizer.json, which is then a Keras configuration.
_PRESET_FILES = (
    "assets/tokenizer/vocabulary.spm",
    "tokenizer.model",
    "vocabulary.spm",
    "tokenizer.json",
)


class Backend(Protocol):
    """What encodes: SentencePiece or Hugging Face tokenizers."""

    pieces: list[str]
    hidden_ids: frozenset[int]
    """Ids that decoding leaves out: `<pad>`, `<bos>`, `<eos>`."""
    whole_pieces: frozenset[str]
    """Pieces that are matched in the text before anything is merged: markers, runs of spaces, HTML tags."""
    splits_at_spaces: bool
    """Whether spaces become `▁` and nothing else happens to a text before its pieces are merged."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


class Tokenizer:
    """A Gemma 4 vocabulary.

    Attributes:
        path: The file it was read from.
        sha256: Hash of that file's bytes, in hexadecimal.
        pieces: Text of every id; `▁` stands for a space, `<0xE4>` for a byte.
        bos, eos, pad: Ids of `<bos>`, `<eos>`, `<pad>`.
        turn_start, turn_end: Ids of `<|turn>` and `<turn|>`.
        stop_ids: Ids that end an answer: `<eos>`, `<turn|>` and, where the vocabulary has it,
            `<|tool_response>`, with which the model hands over to a tool.
        control: Every control token, piece to id: what must never come out of a user's text.
    """

    def __init__(self, path: Path, backend: Backend, sha256: str) -> None:
        self.path = path
        self.sha256 = sha256
        self.backend = backend
        self.pieces = backend.pieces
        self._ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.bos, self.eos, self.pad = map(self.id_of, ("<bos>", "<eos>", "<pad>"))
        self.turn_start, self.turn_end = self.id_of("<|turn>"), self.id_of("<turn|>")
        self.control = {piece: i for i, piece in enumerate(self.pieces) if _is_control(piece)}
        handover = self.control.get("<|tool_response>")
        self.stop_ids = (self.eos, self.turn_end) + ((handover,) if handover is not None else ())

    @classmethod
    def from_preset(cls, preset: str | Path) -> Tokenizer:
        """The vocabulary of a preset: an embedded name, a local HF or KerasHub directory, or a handle.

        A `tokenizer.model` is preferred to a `tokenizer.json` beside it: the ids are the same, and it loads
        faster.

        Raises:
            UserError: There is no such preset, or no vocabulary in it.
        """
        from keras_gemma_ft.presets import resolve_preset

        directory = Path(resolve_preset(str(preset)))
        for name in _PRESET_FILES:
            if (directory / name).is_file():
                return cls.from_file(directory / name)
        raise UserError(
            "the preset has no vocabulary",
            where=str(directory),
            remedy="put tokenizer.model or tokenizer.json of the Gemma 4 model into it.",
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a SentencePiece model (`.model`, `.spm`) or a Hugging Face `tokenizer.json`.

        Raises:
            UserError: The file is missing, is neither, or lacks a token of Gemma 4's chat template.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"the vocabulary cannot be read ({error.strerror})",
                where=str(path),
                remedy="give a tokenizer.model, a *.spm or a tokenizer.json file.",
            ) from error
        kind = _HuggingFace if path.suffix == ".json" else _SentencePiece
        return cls(path, kind(data, str(path)), hashlib.sha256(data).hexdigest())

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.from_file, (self.path,)

    @property
    def vocabulary_size(self) -> int:
        """Number of ids."""
        return len(self.pieces)

    @property
    def serialized(self) -> bytes:
        """The bytes of the vocabulary's file."""
        return self.path.read_bytes()

    def id_of(self, piece: str) -> int:
        """The id of a piece.

        Raises:
            UserError: The vocabulary has no such piece.
        """
        try:
            return self._ids[piece]
        except KeyError:
            raise UserError(
                f"the vocabulary has no token {piece}",
                where=str(self.path),
                remedy="use the vocabulary that belongs to a Gemma 4 preset.",
            ) from None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as its backend gives them; adds neither `<bos>` nor `<eos>`.

        A text that spells a control token such as `<|turn>` gets that token. For conversations use
        `keras_gemma_ft.data.encode`, where only the chat template can make control tokens.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once.

        Raises:
            UserError: A text holds half of a surrogate pair, which is no character.
        """
        for text in texts:
            if not text.isascii():
                check_encodable(text)
        return self.backend.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; leaves `<pad>`, `<bos>` and `<eos>` out, and shows other control tokens as text.

        Bytes that make no UTF-8 character become `�`.
        """
        stream = self.stream()
        return "".join([stream.put(index) for index in ids]) + stream.end()

    def stream(self) -> DecodeStream:
        """A decoder for tokens that arrive one by one; the parts together equal `decode` of all."""
        return DecodeStream(self)

    @cached_property
    def plain_text(self) -> list[str | bytes]:
        """What each id adds to a text: characters, or a single byte of one."""
        contents: list[str | bytes] = []
        for index, piece in enumerate(self.pieces):
            byte = _BYTE_PIECE.match(piece)
            if index in self.backend.hidden_ids:
                contents.append("")
            elif byte:
                contents.append(bytes([int(byte[1], 16)]))
            else:
                contents.append(piece.replace(SPACE, " "))
        return contents

    @cached_property
    def control_spelling(self) -> re.Pattern[str]:
        """Finds spelled control tokens in a text."""
        return re.compile("|".join(map(re.escape, sorted(self.control, key=len, reverse=True))))


class DecodeStream:
    """Decodes token by token and holds back the bytes of a character that is not complete yet.

    For `你` as byte tokens 0xE4 0xBD 0xA0, `put` returns "", "" and "你".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._contents = tokenizer.plain_text
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token_id: int) -> str:
        """The text that became complete with this token."""
        content = self._contents[token_id]
        if isinstance(content, bytes):
            return self._bytes.decode(content)
        return self.end() + content

    def end(self) -> str:
        """What is held back, `�` for an incomplete character."""
        return self._bytes.decode(b"", final=True)


def _is_control(piece: str) -> bool:
    """Whether a piece is a special token, or of the form `<|…>` or `<…|>`."""
    if piece in ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"):
        return True
    return len(piece) > 3 and piece[0] == "<" and piece[-1] == ">" and (piece[1] == "|" or piece[-2] == "|")


class _SentencePiece:
    def __init__(self, model: bytes, where: str) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(
                "this is no SentencePiece model",
                where=where,
                remedy="copy tokenizer.model again from where the preset comes from.",
            ) from error
        every = list(range(self._processor.vocab_size()))
        self.pieces = self._processor.id_to_piece(every)
        control = self._processor.is_control(every)
        self.hidden_ids = frozenset(index for index in every if control[index])
        # The library does not say which pieces are user-defined, but they alone (and control and byte pieces,
        # which no text spells, and the very first merge, which is made before any other anyway) score 0.
        scores = self._processor.get_score(every)
        self.whole_pieces = frozenset(p for p, s in zip(self.pieces, scores, strict=True) if s == 0.0)
        # Gemma's models neither normalize a text nor put a space before it.
        probe = "x ﬁ Ａ"
        self.splits_at_spaces = self._processor.normalize(probe) == probe.replace(" ", SPACE)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # One thread: whoever wants more runs processes, and the library's pool would fight with them.
        return self._processor.encode(list(texts), num_threads=1)


class _HuggingFace:
    def __init__(self, data: bytes, where: str) -> None:
        import tokenizers

        try:
            state = json.loads(data)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                "this is no tokenizer.json of Hugging Face tokenizers",
                where=where,
                remedy="copy tokenizer.json again from where the preset comes from, or give tokenizer.model.",
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.pieces = [""] * (max(vocabulary.values()) + 1)
        for piece, index in vocabulary.items():
            self.pieces[index] = piece
        self.hidden_ids = frozenset(vocabulary[p] for p in ("<pad>", "<eos>", "<bos>") if p in vocabulary)
        self.whole_pieces = frozenset(token.content for token in self._added_tokens())
        normalizer, pre_tokenizer = state.get("normalizer"), state.get("pre_tokenizer")
        self.splits_at_spaces = (
            normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
            # Gemma's converter writes a split at spaces, of which the normalizer has left none.
            and (pre_tokenizer is None or pre_tokenizer.get("pattern") == {"String": " "})
            and state["model"].get("type") == "BPE"
            and not any(token.lstrip or token.rstrip or token.single_word for token in self._added_tokens())
        )

    def _added_tokens(self) -> Iterable[Any]:
        return self._tokenizer.get_added_tokens_decoder().values()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
