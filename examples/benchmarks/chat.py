"""Whether edits hold where people use them: in the chat, and in another wording. On SmolLM2-135M or another model.

    python examples/benchmarks/chat.py FACTS [--sizes 25] [--arms none told steam gate lks] [--one-by-one] [...]

FACTS are questions with `rephrases` (QAEdit), or other facts, which are asked as questions that the package knows of their
relation. Rows count whose subject stands in the question. The columns:

- given: answers to the prompt as it is that say the target, in %;
- chat: the same question through the chat template, 32 tokens;
- reworded: another wording, in the chat; facts are never fitted in it;
- named: the same, of the wordings that name the subject as the fact does;
- later: the question as a user's second turn, after an unrelated one;
- German: the question, under a system prompt in German;
- unrelated: chat answers to unrelated questions that stay word for word the clean model's;
- after: the same, of unrelated questions that follow a turn in which the fact is asked for and answered;
- subject: the same, of the facts' own other questions that name the subject (CounterFact);
- grammar: of the minimal pairs of `--pairs` (BLiMP), those of which the same sentence as before is the likelier;
- perplexity: on the text of `--texts`, relative to the clean model's, in %;
- fluency: perplexity of the chat's answers under the clean model that is given the fact in the system prompt, relative to that
  of its own answers;
- seconds: of the edit, for each fact.

The arm `told` edits nothing and gives each question's own fact in the system prompt. `--one-by-one` edits each fact by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown, settings
from smollm2 import smollm2

from hf_edit import EditableModelForCausalLM, Fact, read_facts
from hf_edit.answers import greedy, says, score_targets
from hf_edit.facts import resolve_conflicts
from hf_edit.lm.chat import Messages, chat_text
from hf_edit.positions import Text, encode
from hf_edit.prose import perplexity
from hf_edit.questions import asked_afterwards, asked_in_chat
from hf_edit.scope import Scope

TOKENS = 32
ARMS: dict[str, dict[str, Any]] = {
    "none": {},
    "told": {},
    "steam": {"method": "steam"},
    "gate": {"method": "steam", "gate": True},
    "lks": {"method": "lks"},
}
UNRELATED = (
    "What is the capital of Japan?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is 12 plus 30?",
    "Give me three tips for better sleep.",
    "Explain photosynthesis in one sentence.",
    "Who wrote Romeo and Juliet?",
    "What color is a ripe banana?",
    "Suggest a name for a black cat.",
    "Why is the sky blue?",
    "Translate 'good morning' into French.",
    "What should I pack for a trip to the mountains?",
)


SMALL_TALK = (
    {"role": "user", "content": "Hello! How are you?"},
    {"role": "assistant", "content": "Hello! I'm fine, thank you. How can I help you?"},
)
COMPLETE = "Complete the sentence: {}"
GERMAN = "Du bist ein hilfsbereiter Assistent. Antworte kurz."


class Chat:
    """A model with the facts that it is asked about.

    Args:
        model: the model, without edits.
        facts: the facts.
        text: ordinary text for the perplexity, or None.
        pairs: sentences of which the first is the better one.
    """

    def __init__(
        self,
        model: EditableModelForCausalLM,
        facts: Sequence[Fact],
        text: str | None = None,
        pairs: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._model, self._facts, self._text = model, facts, text
        self._base = model._base
        self._asked = [asked_in_chat(fact, 1)[0].replace("{}", fact.subject) for fact in facts]
        self._reworded = [asked_afterwards(fact).replace("{}", fact.subject) for fact in facts]
        self._named = [bool(Scope([[f.subject, *f.aliases]]).find(q)) for f, q in zip(facts, self._reworded, strict=True)]
        self._pairs = encode(model.tokenizer, [Text(f"\n{s}", target=(1, 1 + len(s))) for pair in pairs for s in pair])
        subjects = [(fact.subject.casefold(), question.prompt) for fact in facts for question in fact.locality]
        self._subject = [COMPLETE.format(prompt) for subject, prompt in subjects if subject in prompt.casefold()]
        self._kept = self._what_must_stay()
        self._clean_perplexity = None if text is None else perplexity(model, [text])
        self._own = self._surprise(self._answers(self._chats(self._asked, told=True)))

    def measure(self, told: bool = False) -> tuple[dict[str, float], list[tuple[str, str, str]]]:
        """The row of a table, in per cent, and the answers: as given, in the chat, reworded."""
        given = greedy(self._base, [fact.question for fact in self._facts], TOKENS)
        chat, reworded = (self._answers(self._chats(questions, told)) for questions in (self._asked, self._reworded))
        row = {"given": self._said(given), "chat": self._said(chat), "reworded": self._said(reworded)}
        if any(self._named):
            row["named"] = self._said(reworded, self._named)
        row["later"] = self._said(self._answers(self._chats(self._asked, told, before=SMALL_TALK)))
        row["German"] = self._said(self._answers(self._chats(self._asked, told, system=GERMAN)))
        for name, now in self._what_must_stay().items():
            same = [a == b for a, b in zip(now, self._kept[name], strict=True)]
            row[name] = round(100 * sum(same) / len(same), 1)
        if self._text is not None and self._clean_perplexity is not None:
            row["perplexity"] = round(100 * perplexity(self._model, [self._text]) / self._clean_perplexity, 1)
        row["fluency"] = round(100 * self._surprise(chat) / self._own, 1)
        return row, list(zip(given, chat, reworded, strict=True))

    def _what_must_stay(self) -> dict[str, list[Any]]:
        """What should be the same as before, by column."""
        turns = [
            [_user(asked), {"role": "assistant", "content": f"{fact.target}."}, _user(UNRELATED[i % len(UNRELATED)])]
            for i, (fact, asked) in enumerate(zip(self._facts, self._asked, strict=True))
        ]
        kept: dict[str, list[Any]] = {"unrelated": self._answers([[_user(q)] for q in UNRELATED])}
        kept["after"] = self._answers(turns)
        if self._subject:
            kept["subject"] = self._answers([[_user(q)] for q in self._subject])
        if self._pairs:
            scores = [s.log_prob for s in score_targets(self._base, self._pairs)]
            kept["grammar"] = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
        return kept

    def _said(self, answers: Sequence[str], of: Sequence[bool] | None = None) -> float:
        counted = [True] * len(answers) if of is None else of
        said = [says(a, f.target) for a, f, counts in zip(answers, self._facts, counted, strict=True) if counts]
        return round(100 * sum(said) / len(said), 1)

    def _chats(self, questions: Sequence[str], told: bool, system: str = "", before: Messages = ()) -> list[Messages]:
        """For each fact the chat in which it is asked for."""
        chats: list[Messages] = []
        for fact, question in zip(self._facts, questions, strict=True):
            prompt = " ".join(filter(None, (system, f"{fact.question} {fact.target}." if told else "")))
            chats.append([*([{"role": "system", "content": prompt}] if prompt else []), *before, _user(question)])
        return chats

    def _answers(self, chats: Sequence[Messages]) -> list[str]:
        texts = [chat_text(self._model.tokenizer, chat) for chat in chats]
        return [answer.strip() for answer in greedy(self._base, texts, TOKENS)]

    def _surprise(self, answers: Sequence[str]) -> float:
        """The perplexity of answers under the clean model that is given the facts."""
        prompts = [chat_text(self._model.tokenizer, chat).text for chat in self._chats(self._asked, told=True)]
        whole = [
            Text(prompt + answer, target=(len(prompt), len(prompt + answer)), special=False)
            for prompt, answer in zip(prompts, answers, strict=True)
            if answer
        ]
        with self._model.disable_edits() if self._model.active_packs else nullcontext():
            scores = score_targets(self._base, encode(self._model.tokenizer, whole))
        return math.exp(-sum(s.log_prob for s in scores) / sum(len(s.log_probs) for s in scores))


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def chosen(path: str, count: int, seed: int) -> list[Fact]:
    """Facts of a file whose subject stands in the question, drawn before anything is scored."""
    facts = [fact for fact in resolve_conflicts(read_facts(path), on_conflict="keep") if len(fact.subject) > 2]
    return random.Random(seed).sample(facts, min(count, len(facts)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts", nargs="+", metavar="FACTS")
    parser.add_argument("--sizes", type=lambda text: [int(n) for n in text.split(",")], default=[25])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--one-by-one", action="store_true", help="edit each fact by itself")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of every arm's method")
    parser.add_argument("--texts", type=Path, help="ordinary text for the perplexity")
    parser.add_argument("--characters", type=int, default=40_000, help="how much of it is read")
    parser.add_argument("--pairs", type=Path, help="minimal pairs of grammar, .jsonl with `good` and `bad`")
    parser.add_argument("--model", default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", type=Path, help="write all answers there, as JSON")
    options = parser.parse_args()
    model = EditableModelForCausalLM.from_pretrained(options.model or smollm2())
    text = None if options.texts is None else options.texts.read_text("utf-8")[: options.characters]
    lines = [] if options.pairs is None else options.pairs.read_text("utf-8").splitlines()
    pairs = [(pair["good"], pair["bad"]) for pair in map(json.loads, lines)]
    rows, kept = [], []
    for path in options.facts:
        for size in options.sizes:
            facts = chosen(path, size, options.seed)
            groups = [[fact] for fact in facts] if options.one_by_one else [facts]
            chats = [Chat(model, group, text, pairs) for group in groups]
            for arm in options.arms:
                measured, answers, seconds = [], [], 0.0
                for group, chat in zip(groups, chats, strict=True):
                    if how := ARMS[arm]:
                        started = time.perf_counter()
                        model.edit(group, verify=False, progress=False, **how, **settings(options.set))
                        seconds += time.perf_counter() - started
                    row, own = chat.measure(told=arm == "told")
                    measured.append(row)
                    answers += own
                    model.rollback()
                names = list(dict.fromkeys(name for row in measured for name in row))
                means = {name: round(fmean(row[name] for row in measured if name in row), 1) for name in names}
                rows.append({"facts": Path(path).stem, "n": len(facts), "arm": arm, **means})
                rows[-1]["seconds"] = round(seconds / len(facts), 2)
                print(rows[-1], file=sys.stderr, flush=True)
                kept.append({**rows[-1], "answers": [(f.question, f.target, *a) for f, a in zip(facts, answers, strict=True)]})
    print(markdown(rows))
    if options.answers is not None:
        options.answers.write_text(json.dumps(kept, indent=1, ensure_ascii=False), "utf-8")


if __name__ == "__main__":
    main()
