"""The terminal conversation, with a scripted user and a model that reports what it was asked."""

from collections.abc import Callable, Iterator

from keras_gemma_ft.serve.chat import HELP, converse


def _talk(lines: list[str | type[BaseException]], answer: Callable, system: str | None = None) -> str:
    """What was written when the user types `lines` and then ends the input."""
    script, written = iter(lines), []

    def read(_: str) -> str:
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    converse(answer, system=system, read=read, write=written.append)
    return "".join(written)


def _roles(messages: list[dict[str, str]]) -> Iterator[str]:
    for message in messages:
        yield f"{message['role']} "


def test_the_model_sees_the_whole_conversation():
    written = _talk(["one", "", "two"], _roles, system="Be brief.")
    assert written == f"{HELP}model> system user \nmodel> system user assistant user \n\n"


def test_its_answers_are_part_of_the_conversation_and_come_in_pieces():
    seen = []

    def answer(messages: list[dict[str, str]]) -> Iterator[str]:
        seen.append([message["content"] for message in messages])
        yield from ("a", "", "b")

    assert _talk(["one", "two"], answer) == f"{HELP}model> ab\nmodel> ab\n\n"
    assert seen == [["one"], ["one", "ab", "two"]]


def test_reset_keeps_the_instructions_only():
    written = _talk(["one", "/reset", "two"], _roles, system="Be brief.")
    assert written == f"{HELP}model> system user \n(a new conversation)\nmodel> system user \n\n"


def test_quit_and_unknown_commands():
    assert _talk(["/what", "/quit", "never asked"], _roles) == HELP + HELP


def test_an_interrupted_answer_is_no_part_of_the_conversation():
    calls = []

    def answer(messages: list[dict[str, str]]) -> Iterator[str]:
        calls.append(messages)
        yield "as I "
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield from _roles(messages)

    written = _talk(["one", "two"], answer)
    assert written == f"{HELP}model> as I \n(stopped; your message is forgotten)\nmodel> as I user \n\n"


def test_ctrl_c_at_the_prompt_leaves():
    assert _talk([KeyboardInterrupt, "never asked"], _roles) == f"{HELP}\n"
