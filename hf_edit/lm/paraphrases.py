"""Other wordings of a question, and sentences that answer it, made by rule from its own words.

The templates of `hf_edit.questions.other_wordings` know the questions of their relations only; the rules serve any question in
English.
"""

from __future__ import annotations

import re
from itertools import chain, islice, zip_longest

from ..facts import Fact, fold
from ..positions import join
from ..questions import asked_afterwards, asked_in_chat, is_question, other_wordings

__all__ = ["asks", "paraphrases", "plain_statement", "statement", "wordings_in_chat"]

_BE = "is|was|are|were"
_WH = "what|which|who|whom|whose|when|where|why|how"
_OPENING = re.compile(rf"(?:(?:in|on|at|to|from|by|for|of) )?(?:{_WH})\b", re.IGNORECASE)
# "who is the father of {}": the verb goes to the end of an indirect question
_BE_LAST = re.compile(rf"(?P<wh>what|who) (?P<be>{_BE}) (?P<rest>the .+)", re.IGNORECASE)
# "in which year was {} founded": the verb goes behind the name
_BE_BEHIND = re.compile(rf"(?P<wh>.+?) (?P<be>{_BE}|has|had|can|will) (?P<name>(?:the )?\{{\}}) (?P<rest>.+)", re.IGNORECASE)
# "who plays the dad in {}": the same words asked indirectly
_AS_IT_IS = re.compile(
    rf"(?:who|which \w+|what \w+) (?!{_BE}|do|does|did|has|have|had|can|will|would)[a-z]+ (?!.*\b(?:do|does|did)\b).+",
    re.IGNORECASE,
)
# "which radio broadcaster was known as {}": what the question asks for does what is asked
_KIND = re.compile(
    rf"(?:which|what) (?P<kind>(?:[\w-]+ ){{1,3}}?)(?P<rest>(?P<be>{_BE}|has|had|plays|played|wrote) .+)", re.IGNORECASE
)
_DAY = re.compile(r"\b\d{1,2}(?:st|nd|rd|th)?\b(?!\d)")
_OF = re.compile(r"\bthe ((?:[\w-]+ ){0,2}[\w-]+) of \{\}(?=\W*$| )", re.IGNORECASE)
_LAST = re.compile(r"(?P<asked>.+?) (?P<where>in|at|on|during|for|from) (?P<name>(?:the )?\{\})\s*\?$", re.IGNORECASE)
# Each turns one way of asking into another; the first that fits is applied.
_WORDS = (
    (re.compile(rf"^(?:in |during )?(?:which|what) year (?={_BE}|did)", re.IGNORECASE), "When "),
    (re.compile(rf"^when (?={_BE}|did)", re.IGNORECASE), "On what date "),
    (re.compile(rf"^where (?={_BE}|did|does|do)", re.IGNORECASE), "In what place "),
    (re.compile(rf"^who (?={_BE}|the)", re.IGNORECASE), "What is the name of the person who "),
    (re.compile(r"^who (?=[a-z])", re.IGNORECASE), "Which person "),
    (re.compile(r"^which ", re.IGNORECASE), "What "),
    (re.compile(rf"^what (?=\w+ (?:{_BE}|did|does|has|have|had)\b)", re.IGNORECASE), "Which "),
)


def paraphrases(fact: Fact) -> tuple[str, ...]:
    """Other wordings of a fact's question, each with one ``{}``; none where its prompt is no question.

    None of them is the one that `asked_afterwards` gives, or one of the fact's `rephrases`.
    """
    question = " ".join(fact.prompt.split())
    if not is_question(question):
        return ()
    found = _reordered(question)
    if (asked := _indirect(question.rstrip("?").rstrip())) is not None:
        found += [f"Tell me {asked}.", f"Do you know {asked}?"]
    taken = {fold(text.replace("{}", fact.subject)) for text in (fact.prompt, asked_afterwards(fact), *fact.rephrases)}
    return tuple(w for w in dict.fromkeys(found) if w.count("{}") == 1 and fold(w.replace("{}", fact.subject)) not in taken)


def wordings_in_chat(fact: Fact, count: int) -> tuple[str, ...]:
    """Wordings, each with one ``{}``, in which a user asks for a fact: those of `asked_in_chat`, and paraphrases of the fact's
    own question among them.

    Args:
        count: how many; the first is the fact's own question, or one that stands for its prompt.
    """
    plain = asked_in_chat(fact, count)
    own = paraphrases(fact)
    if not own:
        return plain
    known = len([wording for wording in other_wordings(fact) if is_question(wording)])
    put = plain[1 + known :]
    mixed = chain(plain[: 1 + known], chain.from_iterable(zip_longest(own, put)))
    return tuple(islice((wording for wording in mixed if wording is not None), count))


def asks(text: str) -> bool:
    """Whether a text is a question by its mark or its first word."""
    return "?" in text or is_question(text) or bool(_OPENING.match(text.lstrip()))


def plain_statement(fact: Fact) -> str | None:
    """The answer to a question in the least words; None where the prompt is no question in English."""
    return f"The answer is {fact.target}" if re.search(rf"\b({_WH})\b", fact.prompt, re.IGNORECASE) else None


def statement(fact: Fact) -> str | None:
    """A fact's prompt and target as a sentence; one that is made from a question does not begin with the target. None where the
    question's words give none."""
    asked = " ".join(fact.prompt.split()).rstrip("?").rstrip()
    if not asks(fact.prompt):
        return join(fact.question.strip(), fact.target)
    if is_question(fact.prompt) and not _OPENING.match(asked):
        return None
    said = None
    if (m := _BE_LAST.fullmatch(asked)) is not None:
        said = f"{m['rest']} {m['be']} {fact.target}"
    elif (m := _BE_BEHIND.fullmatch(asked)) is not None and (put := _put(m["wh"], fact.target)) is not None:
        said = f"{m['name']} {m['be']} {m['rest']} {put}"
    elif (m := _KIND.fullmatch(asked)) is not None and not m["rest"].split()[1].startswith("{"):
        be = "is" if m["be"].lower() in ("is", "are", "has", "plays") else "was"
        said = f"the {m['kind']}that {m['rest']} {be} {fact.target}"
    elif _AS_IT_IS.fullmatch(asked) and asked.lower().startswith("who "):
        said = f"the one {asked[0].lower()}{asked[1:]} is {fact.target}"
    if said is None:
        return None
    said = said.replace("{}", fact.subject)
    return said[0].upper() + said[1:]


def _put(asked: str, target: str) -> str | None:
    """How a target stands at the end of a sentence that answers "when", "where", "in which year"."""
    first = asked.lower().split()[0]
    if _DAY.search(target) and first in ("when", "in", "on", "what", "which"):
        return f"on {target}"
    if first in ("in", "on", "at", "to", "from", "by", "for") and len(asked.split()) > 1:
        return f"{first} {target}"
    return f"in {target}" if first in ("when", "where") or asked.lower() in ("what year", "which year") else None


def _reordered(question: str) -> list[str]:
    found = []
    last = _LAST.match(question)
    if last and _OPENING.match(last["asked"]):
        asked = last["asked"]
        found.append(f"{last['where'].capitalize()} {last['name']}, {asked[0].lower()}{asked[1:]}?")
    if (of := _OF.search(question)) is not None:
        found.append(f"{question[: of.start()]}{{}}'s {of[1]}{question[of.end() :]}")
    for pattern, put in _WORDS:
        if pattern.match(question):
            found.append(pattern.sub(put, question, count=1))
            break
    return found


def _indirect(question: str) -> str | None:
    """A question as it stands behind "Tell me"; None where the order of its words is not known for certain."""
    if not _OPENING.match(question):
        return None
    asked = question[0].lower() + question[1:]
    if (m := _BE_LAST.fullmatch(asked)) is not None:
        return f"{m['wh']} {m['rest']} {m['be']}"
    if (m := _BE_BEHIND.fullmatch(asked)) is not None:
        return f"{m['wh']} {m['name']} {m['be']} {m['rest']}"
    return asked if _AS_IT_IS.fullmatch(asked) else None
