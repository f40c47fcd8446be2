"""What the chat template puts where: one conversation, message by message, as the published templates do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from keras_gemma_ft.data.script import Script
from keras_gemma_ft.data.tools import ValueWriter
from keras_gemma_ft.errors import UserError

if TYPE_CHECKING:
    from keras_gemma_ft.data.template import Template

MODEL_ROLES = ("assistant", "model")
SYSTEM_ROLES = ("system", "developer")
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


class Layout:
    """Writes one conversation.

    `turn` says where an open model turn stands: `said` (its text), `called` (tools that have not answered
    yet), `answered` (by a tool); `none` when no model turn is open. `held` is text that came with calls: the
    published templates put it after the answers.
    """

    def __init__(
        self,
        template: Template,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        if isinstance(messages, str) or not isinstance(messages, Sequence):
            raise UserError("messages are no list", remedy='write [{"role": ..., "content": ...}, ...].')
        if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
            raise UserError(
                "tools are no list", remedy='write [{"type": "function", "function": {...}}, ...].'
            )
        self.template = template
        self.messages = messages
        self.tools = tools or ()
        self.roles = [_role(message, n) for n, message in enumerate(messages, 1)]
        self.out = Script()
        self.turn = "none"
        self.held = ""
        self.calls: Sequence[Any] = ()
        self.trained = False

    def write(self, add_generation_prompt: bool) -> Script:
        start = self.system_turn()
        last_user = max((n for n, role in enumerate(self.roles) if role == "user"), default=-1)
        first_trained = 0 if self.template.train_on == "all" else _last_model_turn(self.roles)
        for n in range(start, len(self.messages)):
            shown = self.template.thinking == "keep" or (
                self.template.thinking == "last_turn" and n > last_user
            )
            try:
                self.message(self.messages[n], self.roles[n], shown, trained=n >= first_trained)
            except UserError as error:
                raise UserError(error.what, where=f"message {n + 1}", remedy=error.remedy) from error
        self.close()
        # After calls or answers the model's turn is still open: nothing invites it to speak again.
        if add_generation_prompt and self.turn in ("none", "said"):
            self.out.mark("<|turn>model\n")
            if self.template.variant == "large" and not self.template.enable_thinking:
                self.out.mark("<|channel>thought\n<channel|>")
        return self.out

    def system_turn(self) -> int:
        """The first turn: thinking switch, instructions, tools. Returns the index of the message after it."""
        leads = bool(self.roles) and self.roles[0] in SYSTEM_ROLES
        self.out.mark("<bos>")
        if leads or self.tools or self.template.enable_thinking:
            self.out.mark("<|turn>system\n")
            if self.template.enable_thinking:
                self.out.mark("<|think|>\n")
            if leads:
                self.out.say(_content(self.messages[0], is_model=False))
            for tool in self.tools:
                self.values(trained=False).declaration(tool)
            self.out.mark("<turn|>")
            self.out.mark("\n")
        return int(leads)

    def message(self, message: Mapping[str, Any], role: str, shown: bool, trained: bool) -> None:
        if role == "tool":
            self.tool_answer(message)
        elif role in MODEL_ROLES:
            self.model_message(message, shown, trained)
        else:
            self.close()
            self.turn = "none"
            self.out.mark("<|turn>user\n" if role == "user" else "<|turn>system\n")
            self.out.say(_content(message, is_model=False))
            self.out.mark("<turn|>")
            self.out.mark("\n")

    def model_message(self, message: Mapping[str, Any], shown: bool, trained: bool) -> None:
        if self.turn == "none":
            self.out.mark("<|turn>model\n")
        self.trained = trained
        self.out.say(self.held, trained)
        self.held = ""
        thought = _thought(message) if shown else ""
        if thought:
            self.out.mark("<|channel>thought\n", trained)
            self.out.say(thought, trained)
            self.out.mark("\n<channel|>", trained)
        content = _content(message, is_model=True)
        calls = message.get("tool_calls")
        if calls:
            if not isinstance(calls, list | tuple):
                raise UserError("`tool_calls` is no list", remedy='write [{"function": {...}}, ...].')
            for call in calls:
                self.values(trained).call(call)
            self.turn, self.calls, self.held = "called", calls, content
        else:
            self.out.say(content, trained)
            self.turn = "said"

    def tool_answer(self, message: Mapping[str, Any]) -> None:
        if self.turn not in ("called", "answered"):
            raise UserError(
                "a tool answers, but was not called",
                remedy="put it after the model's message with `tool_calls`.",
            )
        name = message.get("name") or "unknown"
        for call in self.calls:
            if call.get("id") and call["id"] == message.get("tool_call_id"):
                name = call["function"]["name"]
        # The first one is the model's: it ends the calls and hands over.
        self.out.mark("<|tool_response>", trained=self.trained and self.turn == "called")
        self.out.say(f"response:{name}{{value:")
        self.values(trained=False).string(_content(message, is_model=False))
        self.out.say("}")
        self.out.mark("<tool_response|>")
        self.turn = "answered"

    def close(self) -> None:
        """Ends an open model turn, the way the published templates do; after an answer they do not."""
        if self.turn == "answered":
            self.out.say(self.held)  # no `<turn|>` follows, so it is not trained
        elif self.turn != "none":
            self.out.say(self.held, self.trained)
            self.out.mark("<turn|>" if self.turn == "said" else "<|tool_response>", self.trained)
            if self.turn == "said":
                self.out.mark("\n")
        self.held = ""

    def values(self, trained: bool) -> ValueWriter:
        return ValueWriter(
            lambda text: self.out.say(text, trained), lambda text: self.out.mark(text, trained)
        )


def _role(message: Any, number: int) -> str:
    if not isinstance(message, Mapping):
        raise UserError(
            f"the message is no object but {type(message).__name__}",
            where=f"message {number}",
            remedy='write {"role": ..., "content": ...}.',
        )
    role = message.get("role")
    if role not in ROLES:
        raise UserError(
            f"unknown role {role!r}", where=f"message {number}", remedy=f"use one of {', '.join(ROLES)}."
        )
    return role


def _last_model_turn(roles: list[str]) -> int:
    """Index of the first message of the last model turn: model and tool messages in a row are one turn."""
    in_turn = (*MODEL_ROLES, "tool")
    end = max((n for n, role in enumerate(roles) if role in MODEL_ROLES), default=len(roles))
    while end > 0 and roles[end - 1] in in_turn:
        end -= 1
    return end


def _content(message: Mapping[str, Any], is_model: bool) -> str:
    """A message's text, stripped; of a model message without the thoughts that its content repeats."""
    content = message.get("content")
    if isinstance(content, str):
        return _spoken(content, is_model)
    if content is None:
        return ""
    if not isinstance(content, list | tuple):
        raise UserError(
            f"the content is no text but {type(content).__name__}",
            remedy="write it as text (JSON values as JSON text), or as a list of text parts.",
        )
    return "".join([_spoken(_part(part), is_model) for part in content])


def _part(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UserError(
        f"the content has a part of type {kind!r}",
        remedy='only {"type": "text", "text": ...} can be trained.',
    )


def _spoken(text: str, is_model: bool) -> str:
    if is_model and "<channel|>" in text:
        text = "".join([piece.split("<|channel>")[0] for piece in text.split("<channel|>")])
    return text.strip()


def _thought(message: Mapping[str, Any]) -> str:
    thought = message.get("reasoning") or message.get("reasoning_content") or ""
    if not isinstance(thought, str):
        raise UserError(f"the reasoning is no text but {type(thought).__name__}", remedy="write it as text.")
    return thought.strip()
