"""A fact's own prompt, recognised by its letters: it asks for the fact whatever a gate has learned."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from .facts import Fact, fold
from .lm.chat import ChatFrame
from .scope import alike, begins_word

__all__ = ["OwnPrompts", "user_says"]

_ENDS = " .…_\"'”’»"
_TAIL = 4  # characters
_SPARE = 256  # tokens that a text may have more than the prompt, in blanks and remarks
# Sentences after a question, in the same line and message: they end as sentences do, and ask nothing.
_REMARK = re.compile(r"[?？؟][\"'”’)]*\s+[^\n?？؟<>|\[\]{}:]{1,120}[.!]\Z")


class OwnPrompts:
    """Recognises facts' own prompts at the end of a text.

    A text ends in a fact's own prompt if its last characters are the prompt with the subject, or one of its aliases, filled in.
    Case, blanks, the kinds of apostrophes and hyphens, and full stops and quotation marks at the end do not matter.
    A question may be followed by a short remark ("Thanks!", "Answer in one word."). Where the prompt is a rendered chat, the
    user's last turn counts, so that it is recognised in plain text, in the chat, and under any system prompt.

    Args:
        facts: in order; `Fact.prompt` of each is text.
        frame: the model's chat; None where it has no chat template.

    Attributes:
        longest: so many tokens at the end of a text hold the longest prompt in full.
    """

    def __init__(self, facts: Sequence[Fact], frame: ChatFrame | None) -> None:
        self._facts, self._frame = facts, frame
        self._known: dict[int, tuple[str, ...]] = {}
        sizes = (_size(f.prompt) + max(map(_size, (f.subject, *f.aliases))) for f in facts)
        self.longest = max(sizes, default=0) + _SPARE

    def asked_by(self, text: str, facts: Sequence[int], remark: bool = True) -> list[int]:
        """The facts whose own prompt ends the text; where one prompt ends in another, those of the longest.

        Args:
            text: up to the end of its content.
            facts: numbers of the facts to look for.
            remark: whether a remark may follow a question.
        """
        found = self._ending(text, facts)
        if not found and remark and (asked := _REMARK.search(text)) is not None:
            found = self._ending(text[: asked.start() + 1], facts)
        return found

    def may_end(self, tail: str, facts: Sequence[int]) -> bool:
        """Whether a text may end in one of the facts' own prompts, by its last characters."""
        if tail.rstrip()[-1:] in (".", "!"):  # a remark may follow the prompt
            return True
        folded = _folded(tail)
        return any(folded.endswith(own[-_TAIL:]) for fact in facts for own in self._of(fact))

    def _ending(self, text: str, facts: Sequence[int]) -> list[int]:
        text = _folded(text)
        lengths = {fact: self._length(text, fact) for fact in facts}
        most = max(lengths.values(), default=0)
        return [fact for fact, length in lengths.items() if length == most] if most else []

    def _length(self, text: str, fact: int) -> int:
        found = (own for own in self._of(fact) if text.endswith(own) and begins_word(text, len(text) - len(own)))
        return max(map(len, found), default=0)

    def _of(self, fact: int) -> tuple[str, ...]:
        if fact not in self._known:
            told = self._facts[fact]
            asked = user_says(told.prompt, self._frame)
            self._known[fact] = tuple(_folded(asked.replace("{}", name)) for name in (told.subject, *told.aliases))
        return self._known[fact]


def user_says(prompt: str, frame: ChatFrame | None) -> str:
    """What the user says last in a prompt that is a rendered chat, if that names the subject by ``{}``; otherwise the prompt.

    A rendered chat whose last turn does not name the subject is kept in full, up to the end of that turn.
    """
    turn = None if frame is None else frame.turn_in(prompt)
    if turn is None or frame is None:
        return prompt
    if "{}" in turn and turn.replace("{}", "").strip():
        return turn
    return prompt[: prompt.rfind(frame.between)]


def _size(text: str) -> int:
    """Bytes of a text in decomposed letters: no tokenizer needs more tokens for it."""
    return len(unicodedata.normalize("NFD", text).encode())


def _folded(text: str) -> str:
    return fold(alike(text).rstrip().rstrip(_ENDS))
