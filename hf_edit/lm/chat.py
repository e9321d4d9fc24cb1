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
        opening: what opens a later turn of the user.
        trims: whether the template takes blanks off the turn's ends.
        bos: the special token that the chat begins with, if any; a rendered chat may leave it to the tokenizer.
    """

    before: str
    between: str
    after: str = ""
    opening: str = ""
    trims: bool = False
    bos: str = ""

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
        """What the user says last in a chat that ends where the assistant's answer begins; None where it is no such chat."""
        if not text.startswith(self.bos):
            text = self.bos + text
        end = text.rfind(self.between)
        if end < 0 or text[end + len(self.between) :].strip():
            return None
        openings = [opening for opening in (self.before, self.opening) if opening]
        begins = [at + len(opening) for opening in openings if (at := text.rfind(opening, 0, end)) >= 0]
        return text[max(begins, default=0) : end] if begins or not openings else None


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
    text = _rendered(tokenizer, messages, answered)
    said = [message["content"] for message in messages if isinstance(message["content"], str)]
    if not all(content.strip() in text for content in said[-1:]):  # some templates take contents in parts only
        parts = [{**m, "content": _parts(m["content"])} for m in messages]
        text = _rendered(tokenizer, parts, answered)
        if said[-1].strip() not in text:
            raise ValueError("the model's chat template leaves out what the last message says")
    return Text(text, special=False)


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], answered: bool) -> str:
    turns = [dict(message) for message in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered)
    except Exception as error:  # templates are programs that anyone may have written, and raise what they like
        roles = ", ".join(str(message.get("role")) for message in turns)
        raise ValueError(f"the model's chat template refuses these messages ({roles}): {error}") from error


def chat_frame(tokenizer: Any, system: str | None = None) -> ChatFrame | None:
    """What the template puts around a user's turn; None without a template, or where it takes no such chat.

    Args:
        system: the system prompt; None for none, or the template's own.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    asked = {"role": "user", "content": _USER}
    try:
        before, mark, between = chat_text(tokenizer, [*first, asked]).text.partition(_USER)
        blanks = chat_text(tokenizer, [*first, {"role": "user", "content": f" {_USER} "}]).text
    except ValueError:
        return None
    if not mark or _USER in between:
        return None
    after, opening = _answer_ends(tokenizer, [*first, asked])
    bos = getattr(tokenizer, "bos_token", None) or ""
    trims = blanks != f"{before} {_USER} {between}"
    return ChatFrame(before, between, after, opening or before, trims, bos if before.startswith(bos) else "")


def _answer_ends(tokenizer: Any, turns: Messages) -> tuple[str, str]:
    """What ends an answer, and what opens the user's next turn; empty where the template does not say."""
    answer = {"role": "assistant", "content": _ASSISTANT}
    try:
        after = chat_text(tokenizer, [*turns, answer], answered=True).text.partition(_ASSISTANT)[2].strip()
        later = chat_text(tokenizer, [*turns, answer, turns[-1]]).text.partition(_ASSISTANT)[2]
    except ValueError:
        return "", ""
    return after, later.partition(_USER)[0].removeprefix(after).lstrip()
