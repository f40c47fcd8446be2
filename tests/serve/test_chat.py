"""The terminal conversation, with a scripted user and a model that reports what it was asked."""

from collections.abc import Callable

from keras_gemma_ft.serve.chat import HELP, converse


def _talk(lines: list[str | type[BaseException]], answer: Callable, system: str | None = None) -> list[str]:
    """What was written when the user types `lines` and then ends the input."""
    script, written = iter(lines), []

    def read(_: str) -> str:
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    converse(answer, system=system, read=read, write=written.append)
    return written


def _roles(messages: list[dict[str, str]]) -> str:
    return " ".join(message["role"] for message in messages)


def test_the_model_sees_the_whole_conversation():
    written = _talk(["one", "", "two"], _roles, system="Be brief.")
    assert written == [
        HELP,
        "model> system user",
        "model> system user assistant user",
        "",
    ]


def test_reset_keeps_the_instructions_only():
    written = _talk(["one", "/reset", "two"], _roles, system="Be brief.")
    assert written[1:4] == ["model> system user", "(a new conversation)", "model> system user"]


def test_quit_and_unknown_commands():
    assert _talk(["/what", "/quit", "never asked"], _roles) == [HELP, HELP]


def test_an_interrupted_answer_is_no_part_of_the_conversation():
    calls = []

    def answer(messages: list[dict[str, str]]) -> str:
        calls.append(messages)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return _roles(messages)

    written = _talk(["one", "two"], answer)
    assert written[1:3] == ["(stopped; your message is forgotten)", "model> user"]


def test_ctrl_c_at_the_prompt_leaves():
    assert _talk([KeyboardInterrupt, "never asked"], _roles) == [HELP, ""]
