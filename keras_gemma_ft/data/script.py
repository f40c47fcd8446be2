"""A conversation laid out as stretches of text, each with who wrote it and whether it is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from keras_gemma_ft.errors import UserError

if TYPE_CHECKING:
    from keras_gemma_ft.data.tokenizer import Tokenizer

TRAINED = 1
"""Flag: the model is to learn to say this."""
STRUCTURE = 2
"""Flag: the template wrote this, so control tokens in it are control tokens. All else is a user's text."""


class Script:
    """Stretches of text in order.

    The question `Hi` answered with `Hello!` is

        <bos>  <|turn>user\\n  Hi  <turn|>  \\n  <|turn>model\\n  Hello!  <turn|>  \\n
          S         S         .     S     S         S            T      S,T    S

    with S for `STRUCTURE` and T for `TRAINED`. Tokens never reach over the seam of two stretches: every seam
    has a control token or a line break on one side, and the text on the other is stripped.

    Attributes:
        texts: The stretches; joined, they are the rendered conversation.
        flags: `TRAINED` and `STRUCTURE`, or'ed, for each stretch.
    """

    __slots__ = ("flags", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.flags: list[int] = []

    def mark(self, text: str, trained: bool = False) -> None:
        """Adds text of the template's own."""
        self.texts.append(text)
        self.flags.append(STRUCTURE | trained)

    def say(self, text: str, trained: bool = False) -> None:
        """Adds text from the data, to the last stretch if that is alike: tokens may reach over such a seam.

        Raises:
            UserError: It holds half of a surrogate pair, which no tokenizer can encode.
        """
        if not text:
            return
        if not text.isascii():
            check_encodable(text)
        if self.flags and self.flags[-1] == trained:
            self.texts[-1] += text
        else:
            self.texts.append(text)
            self.flags.append(int(trained))

    def spelled(self, tokenizer: Tokenizer) -> list[str]:
        """Control tokens that the data spell: what encoding makes ordinary text."""
        data = (text for text, flag in zip(self.texts, self.flags, strict=True) if not flag & STRUCTURE)
        return [token for text in data for token in tokenizer.control_spelling.findall(text)]

    def __str__(self) -> str:
        return "".join(self.texts)


def check_encodable(text: str) -> None:
    """Raises UserError if the text holds half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds half of a surrogate pair ({text[error.start]!r})",
            remedy="write the character itself, or both halves (JSON: \\ud83d\\ude00).",
        ) from error
