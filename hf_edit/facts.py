"""`Fact`: what an edit makes a model say, and which facts contradict each other."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import ConflictingEditsError, SubjectNotFoundError
from .records import fact_fields, question_pairs

__all__ = ["Fact", "Message", "Question", "fold", "is_question", "resolve_conflicts", "superseded", "visible"]

_MAX_NAME = 1000
_MAX_MESSAGES = 64
_ROLE = re.compile(r"[a-z][a-z_]{0,31}")
_HINT = "Write the prompt with one {} where the subject stands, or with the subject in plain text."


@dataclass(frozen=True)
class Question:
    """A prompt and, where it is known, the answer that is expected.

    Attributes:
        prompt: the text that the model continues.
        target: the expected continuation, or None where only "the same as before" is asked for.
    """

    prompt: str
    target: str | None = None

    @classmethod
    def of(cls, value: Any) -> Question:
        """A question from a string, a (prompt, target) pair or a mapping.

        Raises:
            ValueError: the value is none of these.
        """
        if isinstance(value, Question):
            return value
        if isinstance(value, str):
            return cls(value)
        if isinstance(value, Mapping):
            pairs = question_pairs(value)
            pair: Any = pairs[0] if len(pairs) == 1 else None
        else:
            pair = value
        if isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], str | None):
            return cls(pair[0], pair[1] or None)
        raise ValueError(f"a question is a string, a (prompt, target) pair or a mapping with 'prompt', not {value!r:.80}")

    def to_dict(self) -> dict[str, str]:
        return {"prompt": self.prompt} if self.target is None else {"prompt": self.prompt, "target": self.target}


@dataclass(frozen=True, eq=False)
class Message(Mapping[str, str]):
    """A message of a chat: a mapping with `role` and `content` that can't be changed.

    Attributes:
        role: "system", "user", "assistant", or another role that the model's chat template knows.
        content: the text.
    """

    role: str
    content: str

    def __getitem__(self, name: str) -> str:
        if name not in ("role", "content"):
            raise KeyError(name)
        return self.role if name == "role" else self.content

    def __iter__(self) -> Iterator[str]:
        return iter(("role", "content"))

    def __len__(self) -> int:
        return 2

    def __hash__(self) -> int:
        return hash((self.role, self.content))


@dataclass(frozen=True)
class Fact:
    """One fact: after the edit the model continues `prompt`, asked about `subject`, with `target`.

    Attributes:
        subject: the entity that the fact is about.
        prompt: a text that the target continues; one ``{}`` marks the subject. A prompt that holds the subject in plain
            text is taken as well and stored with ``{}`` (at the last mention, which has seen the most context). All texts
            are kept in the Unicode form NFC, this one and `rephrases` with the blanks at their ends. Or a chat: a list of
            messages with `role` and `content`, one ``{}`` in all, which the target answers. It is kept as a tuple of `Message`
            and rendered by the model's own chat template.
        target: the new continuation, without leading space.
        target_old: what the model said, or should have said, before.
        aliases: other names of the subject.
        rephrases: other wordings of the prompt, with ``{}`` or the subject in plain text.
        locality: questions whose answers must not change.
        portability: questions whose answers follow from the fact.
        references: other facts, known to the model, that share the target; STEAM reads its anchors there. Each is a text that
            the target completes, or a `Fact` (also as a mapping or a (subject, prompt) pair) without the target.
        source: where the fact comes from.
        id: by default a hash of the fact's canonical JSON.

    Raises:
        SubjectNotFoundError: the prompt holds neither ``{}`` nor the subject.
        ValueError: a field is empty, holds control characters, or the prompt holds more than one ``{}``; a reference is about
            this fact's subject or has another target.
    """

    subject: str
    prompt: Any  # str, or a tuple of Message
    target: str
    target_old: str | None = None
    aliases: tuple[str, ...] = ()
    rephrases: tuple[str, ...] = ()
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    source: str | None = None
    id: str | None = None
    references: tuple[str | Fact, ...] = ()

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "subject", _text(self.subject, "subject"))
        put(self, "target", _text(self.target, "target"))
        put(self, "prompt", _prompt(self.prompt, self.subject))
        if self.target_old is not None:
            put(self, "target_old", _text(self.target_old, "target_old"))
        put(self, "aliases", tuple(_text(a, "aliases") for a in _several(self.aliases, "aliases")))
        names = (self.subject, *self.aliases)
        rephrases = (_text(r, "rephrases", as_given=True) for r in _several(self.rephrases, "rephrases"))
        put(self, "rephrases", tuple(_rephrase(r, names) for r in rephrases))
        put(self, "locality", tuple(Question.of(q) for q in _several(self.locality, "locality")))
        put(self, "portability", tuple(Question.of(q) for q in _several(self.portability, "portability")))
        references = (_reference(r, self) for r in _several(self.references, "references"))
        put(self, "references", tuple(dict.fromkeys(references)))
        if self.source is not None:
            put(self, "source", _text(self.source, "source"))
        if self.id is None:
            canonical = json.dumps(self._content(), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
            put(self, "id", hashlib.sha256(canonical.encode()).hexdigest()[:16])
        else:
            put(self, "id", _text(self.id, "id"))

    @property
    def form(self) -> str:
        """What the prompt is: "cloze" (the beginning of a sentence), "question", or "messages" (a chat)."""
        if not isinstance(self.prompt, str):
            return "messages"
        return "question" if is_question(self.prompt) else "cloze"

    @property
    def question(self) -> str:
        """The prompt with the subject filled in. A chat is written out as text, for people to read: what the user says, or
        several messages with their roles."""
        if isinstance(self.prompt, str):
            return self.prompt.replace("{}", self.subject)
        said = self.messages or ()
        return said[0].content if len(said) == 1 else "\n".join(f"{m.role}: {m.content}" for m in said)

    @property
    def messages(self) -> tuple[Message, ...] | None:
        """The messages of a chat with the subject filled in, to pass to `model.ask`; None where the prompt is text."""
        if isinstance(self.prompt, str):
            return None
        return tuple(Message(m.role, m.content.replace("{}", self.subject)) for m in self.prompt)

    @property
    def key(self) -> tuple[str, str]:
        """What two facts share when they answer the same question: subject and wording, whatever their case. A chat's wording
        is all of its messages."""
        return fold(self.subject), _folded_prompt(self.prompt)

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """`key`, and those of the rephrases that mark the subject: all wordings of the relation that the fact knows. A chat of
        a single user turn, with or without a system prompt, is a wording as this turn's text."""
        subject = fold(self.subject)
        wordings = [r for r in self.rephrases if "{}" in r]
        if not isinstance(self.prompt, str) and [m.role for m in self.prompt if m.role != "system"] == ["user"]:
            wordings = [m.content for m in self.prompt if "{}" in m.content and m.role == "user"] + wordings
        return tuple(dict.fromkeys((self.key, *((subject, fold(wording)) for wording in wordings))))

    def _content(self) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(message) for message in self.prompt]
        content: dict[str, Any] = {"subject": self.subject, "prompt": prompt, "target": self.target}
        for name in ("target_old", "source"):
            if getattr(self, name) is not None:
                content[name] = getattr(self, name)
        for name in ("aliases", "rephrases"):
            if getattr(self, name):
                content[name] = list(getattr(self, name))
        for name in ("locality", "portability"):
            if getattr(self, name):
                content[name] = [q.to_dict() for q in getattr(self, name)]
        if self.references:
            content["references"] = [
                r if isinstance(r, str) else {"subject": r.subject, "prompt": r.prompt} for r in self.references
            ]
        return content

    def to_dict(self) -> dict[str, Any]:
        """The fact as plain JSON types; `Fact.from_dict` reads it back as an equal fact."""
        return {**self._content(), "id": self.id}

    def replace(self, **changes: Any) -> Fact:
        """The same fact with some fields changed, and a new id unless one is given."""
        return replace(self, **{"id": None, **changes})

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Fact:
        """A fact from its own JSON or from a record of CounterFact, CounterFactPlus, zsRE, EasyEdit or QAEdit, or from one of
        MQuAKE or KnowGIC that holds a single fact.

        Raises:
            ValueError: a field is unknown, missing, or of another type than text or a list; the message names it. Or the record
                holds several facts, which `read_facts` reads.
        """
        found = fact_fields(record)
        if len(found) > 1:
            raise ValueError(f"the record holds {len(found)} facts; read_facts([record]) reads them all")
        return cls(**found[0])


def resolve_conflicts(facts: Sequence[Fact], known: Sequence[Fact] = (), on_conflict: str = "error") -> list[Fact]:
    """The new facts to fit: repetitions dropped, contradictions settled.

    Two facts contradict each other when they are about the same subject, one's prompt is the other's or one of its rephrases
    (see `Fact.keys`), and their targets differ.

    Args:
        facts: the new facts, in order.
        known: the facts already in force.
        on_conflict: "error" refuses, "replace" lets the newest win, "keep" the oldest.

    Raises:
        ConflictingEditsError: a contradiction under "error".
        ValueError: `on_conflict` is none of the three.
    """
    if on_conflict not in ("error", "replace", "keep"):
        raise ValueError(f"on_conflict is 'error', 'replace' or 'keep', not {on_conflict!r}")
    kept: dict[tuple[str, str], Fact] = {}
    asked: dict[tuple[str, str], Fact] = {}
    for fact in known:
        asked.update(dict.fromkeys(fact.keys, fact))
    for fact in facts:
        others = {other.key: other for key in fact.keys if (other := asked.get(key)) is not None}
        clashing = [other for other in others.values() if _contradict(other, fact)]
        if not clashing and fact.key in others and others[fact.key].key == fact.key:
            continue
        if clashing and on_conflict == "error":
            raise ConflictingEditsError(
                f"two targets for {fact.question!r}: {clashing[0].target!r} and {fact.target!r}. Drop one of them, or pass "
                "on_conflict='replace' (the newest wins) or 'keep' (the oldest wins)."
            )
        if clashing and on_conflict == "keep":
            continue
        for other in clashing:
            kept.pop(other.key, None)
        kept.pop(fact.key, None)
        kept[fact.key] = fact
        asked.update(dict.fromkeys(fact.keys, fact))
    return list(kept.values())


def superseded(known: Sequence[Fact], facts: Sequence[Fact]) -> list[Fact]:
    """Those of the known facts that new ones take the place of: the same question, or a contradiction in other words."""
    asked: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        for key in fact.keys:
            asked.setdefault(key, []).append(fact)
    return [
        old for old in known if any(old.key == f.key or _contradict(old, f) for key in old.keys for f in asked.get(key, ()))
    ]


def _contradict(one: Fact, other: Fact) -> bool:
    """Whether two facts that share a question answer it otherwise."""
    return fold(one.target) != fold(other.target)


def _text(value: Any, name: str, *, as_given: bool = False) -> str:
    """A text in NFC, checked.

    Args:
        as_given: keep blanks at its ends: the prompt of a chat template ends in a line break, which the model has to see.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}: {value!r:.80}")
    text = unicodedata.normalize("NFC", value)
    text = text if as_given else text.strip()
    if not visible(text):
        raise ValueError(f"{name} is empty")
    control = next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None)
    if control is not None:
        raise ValueError(f"{name} holds the control character {control!r}: {text!r:.80}")
    if name in ("subject", "aliases") and len(text) > _MAX_NAME:
        raise ValueError(f"{name} has {len(text)} characters, more than the {_MAX_NAME} of any name: {text!r:.80}")
    return text


def visible(text: str) -> str:
    """The characters that are seen: neither spaces nor marks of direction, nor what has no width."""
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) != "Cf")


def _several(value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, (str, Question, Fact)):
        return (value,)
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        return tuple(value)
    raise ValueError(f"{name} is a list, not {type(value).__name__}")


def _template(prompt: str, subject: str, name: str) -> str:
    """`prompt` with exactly one ``{}``."""
    marks = prompt.count("{}")
    if marks == 1:
        return prompt
    if marks > 1:
        raise ValueError(f"{name} holds {marks} times {{}}: {prompt!r:.120}. {_HINT}")
    mentions = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)) or list(re.finditer(re.escape(subject), prompt))
    if not mentions:
        raise SubjectNotFoundError(f"the subject {subject!r} is not in the {name} {prompt!r:.120}. {_HINT}")
    return prompt[: mentions[-1].start()] + "{}" + prompt[mentions[-1].end() :]


def _prompt(value: Any, subject: str) -> str | tuple[Message, ...]:
    """A prompt, checked: text, or messages, with exactly one ``{}``."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return _messages(value, subject)
    if isinstance(value, Mapping):
        raise ValueError("a prompt of messages is a list of them; put this one into a list")
    return _template(_text(value, "prompt", as_given=True), subject, "prompt")


def _messages(value: Sequence[Any], subject: str) -> tuple[Message, ...]:
    if not 0 < len(value) <= _MAX_MESSAGES:
        raise ValueError(f"prompt has {len(value)} messages; a chat has 1 to {_MAX_MESSAGES}")
    messages = [_message(message) for message in value]
    if messages[-1].role == "assistant":
        raise ValueError("prompt ends with a message of the assistant, whose answer is the target: leave that message out")
    marks = sum(message.content.count("{}") for message in messages)
    if marks > 1:
        raise ValueError(f"the messages of prompt hold {marks} times {{}}. {_HINT}")
    if not marks:
        for number in reversed(range(len(messages))):
            try:
                content = _template(messages[number].content, subject, "prompt")
            except SubjectNotFoundError:
                continue
            messages[number] = Message(messages[number].role, content)
            break
        else:
            raise SubjectNotFoundError(f"the subject {subject!r} is in none of the {len(messages)} messages of prompt. {_HINT}")
    return tuple(messages)


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        raise ValueError(f"a message of prompt is a mapping with 'role' and 'content' and nothing else, not {value!r:.120}")
    role = value["role"]
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ValueError(f"the role of a message is a word such as 'system', 'user' or 'assistant', not {role!r:.80}")
    return Message(role, _text(value["content"], "the content of a message", as_given=True))


def _folded_prompt(prompt: str | tuple[Message, ...]) -> str:
    """A prompt as it is compared. That of a chat begins with a character that no text may hold."""
    if isinstance(prompt, str):
        return fold(prompt)
    return "\0" + json.dumps([[message.role, fold(message.content)] for message in prompt], ensure_ascii=False)


def _reference(value: Any, fact: Fact) -> str | Fact:
    """A fact's reference, checked: a text, or a `Fact` of nothing but subject, prompt and the shared target."""
    known: str | Fact
    if isinstance(value, str):
        known = said = _text(value, "references")
        if "{}" in value:
            raise ValueError(
                f"references: {value!r:.120} holds {{}} and names no subject; give a mapping with subject and prompt"
            )
    else:
        known = _shared(value, fact)
        said = known.question
    if re.search(rf"(?<!\w){re.escape(fold(fact.subject))}(?!\w)", fold(said)):
        raise ValueError(f"references: {said!r:.120} mentions {fact.subject!r}, the subject of the edit; give others' facts")
    return known


def _shared(value: Any, fact: Fact) -> Fact:
    if isinstance(value, Sequence) and len(value) == 2:
        value = {"subject": value[0], "prompt": value[1]}
    if isinstance(value, Mapping):
        value = Fact.from_dict({"target": fact.target, **value})
    if not isinstance(value, Fact):
        raise ValueError(f"a reference is a text, a Fact, a mapping or a (subject, prompt) pair, not {value!r:.80}")
    if fold(value.target) != fold(fact.target):
        raise ValueError(f"references share the fact's target {fact.target!r}, and {value.question!r} has {value.target!r}")
    if value.form == "messages":
        raise ValueError(f"the prompt of a reference is text, not messages: {value.question!r:.120}")
    return Fact(value.subject, value.prompt, fact.target)


def _rephrase(text: str, names: Sequence[str]) -> str:
    # Rephrases of public data sets may name the subject by an alias or in another case: kept as plain text then.
    for name in names:
        try:
            return _template(text, name, "rephrases")
        except SubjectNotFoundError:
            continue
    return text


_QUESTION_MARKS = ("?", "？", "؟")


def is_question(prompt: str) -> bool:
    """Whether a prompt is a question rather than the beginning of a sentence."""
    return prompt.rstrip().endswith(_QUESTION_MARKS)


def fold(text: str) -> str:
    """A text as it is compared: without case, in one Unicode form, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())
