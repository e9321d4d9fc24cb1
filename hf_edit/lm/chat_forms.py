"""Facts in a chat: how a user asks for them, and how the model itself would answer if it knew them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..answers import fits, says
from ..base import Base
from ..facts import Fact, fold
from ..positions import Text, encode, fact_text, pad
from ..progress import bar
from ..questions import asked_in_chat
from .chat import ChatFrame, Messages, chat_frame, chat_text
from .paraphrases import asks, plain_statement, statement, wordings_in_chat

__all__ = ["asked_plainly", "chat_forms", "chat_frames", "given_chat", "natural_answers", "worded_answer"]

logger = logging.getLogger(__name__)

_SYSTEM = (None, "You are a helpful assistant.", "Answer the user's questions.")
_ANSWER_TOKENS = 24
_LONGEST = 28  # tokens of an answer, unless its target has more
_BATCH = 32
_BARE, _UNNAMED, _OWN, _PLAIN = 8.0, 2.0, 3.0, 5.0  # nats, see `_phrased`
_ARTICLES = ("a", "an", "the")  # a sentence of one of these and a target says no more than the target
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
        wordings = enumerate(wordings_in_chat(own, count))
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
    """How the model would answer in the chat if it knew the facts (context distillation): for each, a sentence with the target.

    The model is given the fact in its system prompt and answers. Where its first sentence holds the target, that is the answer.
    Otherwise the sentence is cut at the word in front of which the target is likeliest, and the target ends it. Sentences that
    begin with the bare target, repeat the question or don't name the subject are at a disadvantage. The generation itself tells
    all that: it takes no other forward.

    Args:
        base: the model as it stands, without the edit; its tokenizer has a chat template.
    """
    found: list[str] = [_closed(fact.target) for fact in facts]
    asked = [(i, prompt) for i, fact in enumerate(facts) if (prompt := given_chat(base, fact)) is not None]
    order = sorted(asked, key=lambda pair: len(pair[1].text))
    with bar(len(order), "phrasing answers", "fact", progress) as shown:
        for first in range(0, len(order), _BATCH):
            group = order[first : first + _BATCH]
            steps = _Steps(_first_token(base, facts[i].target) for i, _ in group)
            rows = [text.ids for text in encode(base.tokenizer, [prompt for _, prompt in group])]
            made = _generated(base, rows, _ANSWER_TOKENS, steps)
            for n, ((i, _), ids) in enumerate(zip(group, made, strict=True)):
                found[i] = _phrased(base.tokenizer, facts[i], ids, steps.of(n))
                shown.update(1)
    return found


def worded_answer(fact: Fact) -> str:
    """A fact's answer by the words of its question alone, which takes no forward; the bare target where they make none."""
    return _closed(statement(fact) or plain_statement(fact) or fact.target)


def given_chat(base: Base, fact: Fact) -> Text | None:
    """The chat in which the model is given a fact and asked for it, up to where its answer begins; None where the model has no
    positions for that."""
    try:
        text = chat_text(base.tokenizer, _told_before(fact))
    except ValueError:  # some templates take no system prompt
        text = chat_text(base.tokenizer, _question_and_hint(fact))
    return text if fits(base, encode(base.tokenizer, [text])[0], 2 * _ANSWER_TOKENS) else None


class _Steps(LogitsProcessor):
    """Notes, at each step of a generation, how likely a given token of each row is. It changes nothing."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self._tokens = torch.tensor(list(tokens))[:, None]
        self._seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        likely = scores.float().log_softmax(-1).gather(1, self._tokens.to(scores.device))
        self._seen.append(likely[:, 0].cpu())
        return scores

    def of(self, row: int) -> list[float]:
        """Log-probabilities, by step."""
        return [float(step[row]) for step in self._seen]


@torch.no_grad()
def _generated(base: Base, rows: Sequence[Sequence[int]], length: int, steps: _Steps) -> list[list[int]]:
    """Greedy continuations, each up to the end of its answer."""
    ids, mask = pad(rows, side="left", device=base.device)
    end = base.model.generation_config.eos_token_id
    ends = [end] if isinstance(end, int) else list(end or ())
    config = GenerationConfig(
        max_new_tokens=length, do_sample=False, eos_token_id=ends or None, pad_token_id=min(ends, default=0)
    )
    processors = LogitsProcessorList([steps])
    out = base.model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors)
    made = out[:, ids.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in made]


def _first_token(base: Base, target: str) -> int:
    """The token that a target begins with behind a word."""
    return encode(base.tokenizer, [Text(f"a {target}", target=(1, 2 + len(target)))])[0].labels[0]


def _phrased(tokenizer: Any, fact: Fact, ids: Sequence[int], likely: Sequence[float]) -> str:
    """The sentence with the target that an answer comes closest to.

    Args:
        ids: of the answer.
        likely: for each of its tokens, the log-probability of the target's first token in its place.
    """
    answer = tokenizer.decode(ids, skip_special_tokens=True)
    sentence = _first_sentence(answer.lstrip())
    found: list[tuple[float, str]] = [(_penalty(_closed(fact.target), fact), _closed(fact.target))]
    if says(sentence, fact.target) and _SENTENCE_END.search(sentence):
        found.append((_penalty(sentence, fact), sentence))
    for whole, cost in ((statement(fact), _OWN), (plain_statement(fact), _PLAIN)):
        if whole is not None:
            found.append((_penalty(_closed(whole), fact) - cost, _closed(whole)))
    for n in range(1, len(ids)):
        before, after = (tokenizer.decode(ids[:end], skip_special_tokens=True).lstrip() for end in (n, n + 1))
        if len(before) >= len(sentence):
            break
        if (
            after[len(before) :][:1] != " "
            or before.lower() in _ARTICLES
            or says(before, fact.target)
            or fold(before.split()[-1]) == fold(fact.target.split()[0])
        ):
            continue
        text = _closed(f"{before} {fact.target}")
        found.append((likely[n] + _penalty(text, fact), text))
    short = [(score, text) for score, text in found if len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= _LONGEST]
    return max(short or found[:1])[1]


def _penalty(answer: str, fact: Fact) -> float:
    """What an answer must make up for, in nats."""
    said = fold(answer)
    bare = said.startswith(fold(fact.target)) or asks(answer)
    return -_BARE * bare - _UNNAMED * (fold(fact.subject) not in said)


def _first_sentence(answer: str) -> str:
    end = _SENTENCE_END.search(answer)
    return answer if end is None else answer[: end.end()].strip()


def _closed(target: str) -> str:
    return target if target[-1] in ".!?。！？" else f"{target}."


def _question_and_hint(fact: Fact) -> Messages:
    question = _question(fact)
    return [{"role": "user", "content": f"{question} (The answer is {fact.target}.) Answer in one full sentence."}]


def _told_before(fact: Fact) -> Messages:
    question = _question(fact)
    return [{"role": "system", "content": f"{question} {fact.target}."}, {"role": "user", "content": question}]


def _question(fact: Fact) -> str:
    return asked_in_chat(fact, 1)[0].replace("{}", fact.subject)
