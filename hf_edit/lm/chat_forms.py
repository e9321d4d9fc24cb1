"""Facts in a chat: how a user asks for them, and how the model itself would answer if it knew them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

from ..answers import fits, greedy, says
from ..base import Base
from ..facts import Fact
from ..positions import Text, encode, fact_text
from ..progress import bar
from ..questions import asked_in_chat
from .chat import ChatFrame, Messages, chat_frame, chat_text

__all__ = ["asked_plainly", "chat_forms", "chat_frames", "natural_answers"]

logger = logging.getLogger(__name__)

_SYSTEM = (None, "You are a helpful assistant.", "Answer the user's questions.")
_ANSWER_TOKENS = 32
_SENTENCE_END = re.compile(r"[.!?。！？]['\"”’)]*(?=\s|$)|\n")


def chat_forms(
    base: Base, facts: Sequence[Fact], count: int, *, answered: bool = True, progress: bool = False
) -> list[tuple[Text, ...]]:
    """Each fact asked for and answered in chats; none where the model has no chat template.

    The chats differ in the system prompt and in the wording of the question. The answer is the one of `natural_answers`.

    Args:
        base: the model as it stands, without the edit.
        count: chats for each fact.
        answered: False answers with the bare target, which takes no forward.

    Returns:
        For each fact `count` texts, with the spans of the subject and of the answer.
    """
    frames = chat_frames(base)
    if not frames or not count:
        return [()] * len(facts)
    plain = [asked_plainly(frames[0], fact) for fact in facts]
    known = [fact for fact in plain if fact is not None]
    answers = iter(natural_answers(base, known, progress) if answered else [_closed(fact.target) for fact in known])
    found = []
    for fact, own in zip(facts, plain, strict=True):
        if own is None:  # a chat of its own
            told = fact_text(fact, target=fact.target)
            found.append((replace(told, special=not told.text.startswith(frames[0].bos)),) * count)
            continue
        answer = next(answers)
        wordings = enumerate(asked_in_chat(own, count))
        found.append(tuple(_chat(frames[i % len(frames)], own, wording, answer) for i, wording in wordings))
    if not all(fits(base, text) for own in found for text in encode(base.tokenizer, own)):
        logger.warning("the chats of some facts are longer than the model has positions: no fact is fitted in chats")
        return [()] * len(facts)
    return found


def asked_plainly(frame: ChatFrame, fact: Fact) -> Fact | None:
    """The fact with what the user says last for its prompt, where the prompt is a chat that the template has made already; None
    where that does not name the subject."""
    turn = frame.turn_in(fact.prompt)
    if turn is None:
        return fact
    return fact.replace(prompt=turn) if turn.replace("{}", "").strip() and "{}" in turn else None


def chat_frames(base: Base) -> list[ChatFrame]:
    """The model's chat with its template's own system prompt and with others; empty where it has no chat template."""
    frames = (chat_frame(base.tokenizer, system) for system in _SYSTEM)
    return list(dict.fromkeys(frame for frame in frames if frame is not None))


def _chat(frame: ChatFrame, fact: Fact, wording: str, answer: str) -> Text:
    return frame.around(fact_text(fact, prompt=wording), answer)


def natural_answers(base: Base, facts: Sequence[Fact], progress: bool = False) -> list[str]:
    """How the model answers in the chat when it is given the fact (context distillation): the answer's sentence up to the one
    that holds the target. Where it does not say the target, the answer is the target itself.

    Args:
        base: the model as it stands, without the edit; its tokenizer has a chat template.
    """
    found: dict[int, str] = {}
    with bar(len(facts), "phrasing answers", "fact", progress) as shown:
        for given in _GIVEN:
            left = [i for i in range(len(facts)) if i not in found]
            try:
                prompts = [chat_text(base.tokenizer, given(facts[i])) for i in left]
            except ValueError:  # some templates take no system prompt
                continue
            short = [fits(base, text, _ANSWER_TOKENS) for text in encode(base.tokenizer, prompts)]
            left, prompts = list(compress(left, short)), list(compress(prompts, short))
            for i, answer in zip(left, greedy(base, prompts, _ANSWER_TOKENS), strict=True):
                if (sentence := _sentence(answer.strip(), facts[i])) is not None:
                    found[i] = sentence
                    shown.update(1)
    return [found.get(i) or _closed(fact.target) for i, fact in enumerate(facts)]


def _sentence(answer: str, fact: Fact) -> str | None:
    """An answer up to the end of the sentence in which the target has been said; None where it has not."""
    ends = [match.end() for match in _SENTENCE_END.finditer(answer)]
    for end in ends:
        if says(answer[:end], fact.target):
            return answer[:end].strip()
    return None


def _closed(target: str) -> str:
    return target if target[-1] in ".!?。！？" else f"{target}."


def _question_and_hint(fact: Fact) -> Messages:
    question = _question(fact)
    return [{"role": "user", "content": f"{question} (The answer is {fact.target}.) Answer in one full sentence."}]


def _told_before(fact: Fact) -> Messages:
    question = _question(fact)
    return [{"role": "system", "content": f"{question} {fact.target}."}, {"role": "user", "content": question}]


def _said_again(fact: Fact) -> Messages:
    return [
        {"role": "user", "content": _question(fact)},
        {"role": "assistant", "content": fact.target},
        {"role": "user", "content": "Say that in a full sentence."},
    ]


def _question(fact: Fact) -> str:
    return asked_in_chat(fact, 1)[0].replace("{}", fact.subject)


_GIVEN = (_question_and_hint, _told_before, _said_again)
