"""A model's chat template: how a user's turn stands between what the template puts around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..positions import Text

__all__ = ["ChatFrame", "Messages", "chat_frame", "chat_text", "is_messages"]

Messages = Sequence[Mapping[str, str]]

_USER, _ASSISTANT = "hf-edit-user-turn", "hf-edit-assistant-turn"


@dataclass(frozen=True)
class ChatFrame:
    """A chat of one user turn and the assistant's answer.

    Attributes:
        before: what stands in front of the user's turn, special tokens included.
        between: what stands between the turn and where the answer begins.
        after: what ends the answer.
        trims: whether the template takes blanks off the turn's ends.
    """

    before: str
    between: str
    after: str = ""
    trims: bool = False

    def around(self, turn: Text, answer: str | None = None) -> Text:
        """The chat as text.

        Args:
            turn: what the user says, with the subject's span and without a target.
            answer: what the assistant answers, which becomes the target together with what ends it; None ends the text where
                an answer would begin.
        """
        said, shift = turn.text, len(self.before)
        if self.trims:
            shift -= len(said) - len(said.lstrip())
            said = said.strip()
        subject = None if turn.subject is None else (turn.subject[0] + shift, turn.subject[1] + shift)
        prompt = self.before + said + self.between
        if answer is None:
            return Text(prompt, subject, special=False)
        whole = prompt + answer + self.after
        return Text(whole, subject, (len(prompt), len(whole)), special=False)

    def turn_in(self, text: str) -> str | None:
        """What the user says in a text that ends where the assistant's answer begins; None where it is no such chat."""
        end = text.rfind(self.between)
        start = text.rfind(self._opening, 0, max(end, 0))
        if end < 0 or start < 0 or text[end + len(self.between) :].strip():
            return None
        return text[start + len(self._opening) : end]

    @property
    def _opening(self) -> str:
        """What opens the user's turn: the last line of what stands in front of it, or all of it."""
        lines = self.before.rstrip("\n").splitlines(keepends=True)
        blanks = self.before[len(self.before.rstrip("\n")) :]
        return (lines[-1] if lines else "") + blanks


def is_messages(value: Any) -> bool:
    """Whether this is a list of chat messages, each a mapping with a role and a content."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value)
    )


def chat_text(tokenizer: Any, messages: Messages, *, answered: bool = False) -> Text:
    """A chat as the model reads it, up to where the assistant's next answer begins.

    Args:
        messages: `role` and `content` of each turn so far.
        answered: the last turn is the assistant's own, and no other one begins.

    Raises:
        ValueError: the tokenizer has no chat template, or the template refuses these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template: ask with plain text, or set tokenizer.chat_template")
    turns = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered)
    except Exception as error:  # templates are programs that anyone may have written, and raise what they like
        roles = ", ".join(str(message.get("role")) for message in turns)
        raise ValueError(f"the model's chat template refuses these messages ({roles}): {error}") from error
    return Text(text, special=False)


def chat_frame(tokenizer: Any, system: str | None = None) -> ChatFrame | None:
    """What the template puts around a user's turn; None without a template, or where it takes no such chat.

    Args:
        system: the system prompt; None for none, or the template's own.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [*first, {"role": "user", "content": f" {_USER} "}]
    try:
        asked = chat_text(tokenizer, turns).text
    except ValueError:
        return None
    before, mark, between = asked.partition(_USER)
    if not mark or _USER in between:
        return None
    trims = not (before.endswith(" ") and between.startswith(" "))
    if not trims:
        before, between = before[:-1], between[1:]
    return ChatFrame(before, between, _answer_end(tokenizer, turns), trims)


def _answer_end(tokenizer: Any, turns: Messages) -> str:
    """What ends an answer; empty where the template does not say."""
    try:
        text = chat_text(tokenizer, [*turns, {"role": "assistant", "content": _ASSISTANT}], answered=True).text
    except ValueError:
        return ""
    return text.partition(_ASSISTANT)[2].strip()
