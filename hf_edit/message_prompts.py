"""Facts whose prompt is a chat, as the model reads them: rendered by its tokenizer's own chat template.

A `Fact` keeps its messages. Methods, which work on text, get facts whose prompt is the rendered chat up to where the answer
begins; packs, reports and cards have the facts as they were given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .errors import BaseMismatchError
from .facts import Fact, Message
from .lm.chat import chat_text

if TYPE_CHECKING:
    from .methods import Fit

__all__ = ["as_given", "as_text", "fit_as_text"]


def as_text(tokenizer: Any, facts: Sequence[Fact]) -> list[Fact]:
    """The same facts under the same ids, each chat rendered as text.

    The text is such that the tokenizer, which may put special tokens in front of it, gives the tokens of the chat template.

    Raises:
        ValueError: the tokenizer has no chat template, or the template can't render a fact's messages.
    """
    return [fact if fact.form != "messages" else fact.replace(prompt=_text_of(tokenizer, fact), id=fact.id) for fact in facts]


def fit_as_text(tokenizer: Any, fit: Fit) -> Fit:
    """A fit whose facts are text, see `as_text`.

    Raises:
        BaseMismatchError: a fact is a chat that this tokenizer can't render.
    """
    if all(fact.form != "messages" for fact in fit.facts):
        return fit
    try:
        return replace(fit, facts=tuple(as_text(tokenizer, fit.facts)))
    except ValueError as error:
        raise BaseMismatchError(f"the edit has facts whose prompts are chats, which this model can't read: {error}") from error


def as_given(fit: Fit, facts: Sequence[Fact]) -> Fit:
    """A fit with its facts as they were given, known by their ids."""
    given = {fact.id: fact for fact in facts if fact.form == "messages"}
    return replace(fit, facts=tuple(given.get(fact.id, fact) for fact in fit.facts)) if given else fit


def _text_of(tokenizer: Any, fact: Fact) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            f"the prompt of {fact.question!r:.120} is a list of messages, and the model's tokenizer has no chat template. Give "
            "the prompt as text, or set tokenizer.chat_template."
        )
    return _rendered(tokenizer, repr(template), fact.prompt)


@lru_cache(maxsize=4096)
def _rendered(tokenizer: Any, _: str, messages: tuple[Message, ...]) -> str:
    """The chat as text, remembered for the tokenizer and its template of now."""
    text = chat_text(tokenizer, messages).text
    if (marks := text.count("{}")) != 1:
        raise ValueError(
            f"the model's chat template changes the messages: it renders {marks} times {{}} for the subject, not once. Give "
            "the prompt as text."
        )
    bos = getattr(tokenizer, "bos_token", None)
    if bos and text.startswith(bos):
        rest = text.removeprefix(bos)
        if tokenizer(rest)["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]:
            return rest
    return text
