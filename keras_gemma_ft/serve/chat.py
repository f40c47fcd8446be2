"""A conversation with a tuned model in the terminal."""

from __future__ import annotations

from collections.abc import Callable

Message = dict[str, str]
HELP = "Type a message. /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def converse(
    answer: Callable[[list[Message]], str],
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = print,
) -> None:
    """Reads messages and writes answers, turn by turn, until the user leaves.

    Args:
        answer: Gives the model's reply to a conversation that ends in a user message.
        system: Instructions that every conversation starts with.
        read: Shows a prompt and gives one line; raises EOFError at the end of input.
        write: Shows one text.
    """
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    write(HELP)
    while True:
        try:
            line = read("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            write("")  # the shell's prompt starts on a line of its own
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
            write("(a new conversation)")
        elif line.startswith("/"):
            write(HELP)
        elif line:
            question: Message = {"role": "user", "content": line}
            try:
                reply = answer([*messages, question])
            except KeyboardInterrupt:
                write("(stopped; your message is forgotten)")
                continue
            messages += [question, {"role": "assistant", "content": reply}]
            write(f"model> {reply}")
