"""A conversation with a tuned model in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from keras_gemma_ft.errors import UserError

Message = dict[str, str]
HELP = "Type a message. /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer.\n"


@dataclass(frozen=True)
class Options:
    """What the verb's flags say; the defaults are the sampling that was published with Gemma 4.

    Attributes:
        system: Instructions that every conversation starts with.
        temperature, top_k, top_p, seed: As for `GemmaCausalLM.generate`.
        max_new_tokens: Longest answer.
    """

    system: str | None = None
    temperature: float = 1.0
    top_k: int | None = 64
    top_p: float | None = 0.95
    seed: int = 0
    max_new_tokens: int = 1024


def main(config: ConfigDict, workdir: str | Path, options: Options = Options()) -> None:
    """Talks with the best checkpoint of a run.

    Raises:
        UserError: The run has no checkpoint, or an option is out of its range.
    """
    from keras_gemma_ft import checkpoint
    from keras_gemma_ft.model.generation import stream

    model, saved = checkpoint.tuned_model(config, workdir)
    print(f"{config.preset}, tuned for {saved.step:,} steps")

    def answer(messages: list[Message]) -> Iterable[str]:
        return stream(
            model,
            messages,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            # Another seed for each turn, or equal questions would get equal answers.
            seed=options.seed + len(messages),
        )

    converse(answer, options.system)


def converse(
    answer: Callable[[list[Message]], Iterable[str]],
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Reads messages and writes answers, turn by turn, until the user leaves.

    Args:
        answer: Gives the model's reply to a conversation that ends in a user message, piece by piece.
        system: Instructions that every conversation starts with.
        read: Shows a prompt and gives one line; raises EOFError at the end of input.
        write: Shows some text.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    write(HELP)
    while True:
        try:
            line = read("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("\n")  # the shell's prompt starts on a line of its own
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
            write("(a new conversation)\n")
        elif line.startswith("/"):
            write(HELP)
        elif line:
            question: Message = {"role": "user", "content": line}
            reply = ""
            write("model> ")
            try:
                for piece in answer([*messages, question]):
                    reply += piece
                    write(piece)
            except KeyboardInterrupt:
                write("\n(stopped; your message is forgotten)\n")
                continue
            except UserError as error:  # such as a conversation that has become too long
                write(f"\n({error})\n")
                continue
            messages += [question, {"role": "assistant", "content": reply}]
            write("\n")
