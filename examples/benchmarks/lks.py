"""LKS at growing numbers of facts, beside what one would use instead.

    python examples/benchmarks/lks.py FACTS [--sizes 10,100,1000] [--arms lks,prompt,released,memit] [--output DIR]

FACTS is a .jsonl, .json or .csv file of facts with paraphrases (`rephrases`) and questions about the same subject (`locality`),
such as CounterFact or zsRE with the fields of the LKS paper. The arms, each on the same facts:

    lks       `method="lks"` as it is
    prompt    no edit: the fact itself stands in front of every prompt that mentions its subject, found by the same scope
    released  the paper's released form: KB = W x + b overwrites the state, nothing trained beforehand
    memit     `method="memit"`, weights edited in one batch

Of contradictory facts the newest counts. The last rows of the file, on subjects of their own, are the unrelated prompts. The
metrics are those of `hf_edit.metrics`, in free generation and teacher-forced, on --evaluated facts spread evenly over all.
*Fires* is the share of unrelated prompts in which the scope finds an edited subject. *Generation* is the time that --tokens
greedy tokens behind a batch of --prompts take with the edits, relative to the clean model: the median of paired runs in turns.

With --rephrases, the arm lks is also given the rephrases and questions of the facts that are not asked (`train_on_rephrases`),
but for those in the very words of one that is measured: of these it is given none, about any subject.

With --output, what is finished is kept and not computed again, and so are the packs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown, percent, settings
from smollm2 import smollm2

from hf_edit import EditableModelForCausalLM, Fact, Question, read_facts
from hf_edit.base import Base
from hf_edit.cache import atomic_path
from hf_edit.evaluation import evaluate, perplexity
from hf_edit.facts import fold, resolve_conflicts
from hf_edit.positions import join
from hf_edit.scope import Scope

ARMS = ("lks", "prompt", "released", "memit")
METRICS = ["efficacy", "paraphrase", "same_subject", "repetition"]


def read(path: Path, unrelated: int) -> tuple[list[Fact], list[Fact]]:
    """Facts to edit, the newest of contradictory ones, and rows about other subjects whose prompts must go on as before."""
    facts = resolve_conflicts(read_facts(path), on_conflict="replace")
    rest, facts = facts[-unrelated:], facts[:-unrelated]
    taken = {fold(f.subject) for f in facts}
    others = [
        Fact(f.subject, f.prompt, f.target, locality=(Question(f.question),)) for f in rest if fold(f.subject) not in taken
    ]
    if not facts or not others:
        raise SystemExit(f"{path} has too few facts for {unrelated} unrelated prompts beside them; see --unrelated")
    return facts, others


class FactInFront:
    """A tokenizer that puts what is known of a mentioned subject in front of a text; its offsets are those of the text.

    Args:
        tokenizer: of the model.
        facts: what is known.
    """

    def __init__(self, tokenizer: Any, facts: Sequence[Fact]) -> None:
        self._tokenizer = tokenizer
        told: dict[str, list[Fact]] = {}
        for fact in facts:
            told.setdefault(fact.subject.casefold(), []).append(fact)
        self._scope = Scope([list({n for f in own for n in (f.subject, *f.aliases)}) for own in told.values()])
        self._told = [" ".join(join(f.question, f.target) + "." for f in own) + " " for own in told.values()]
        self.on = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def in_front(self, text: str) -> str:
        """What is put in front of a text; nothing where no subject is mentioned."""
        return "".join(self._told[i] for i in dict.fromkeys(m.entity for m in self._scope.find(text))) if self.on else ""

    def __call__(self, text: str | list[str], **kwargs: Any) -> Any:
        single = isinstance(text, str)
        texts = [text] if single else text
        fronts = [self.in_front(t) for t in texts]
        batch = self._tokenizer([front + t for front, t in zip(fronts, texts, strict=True)], **kwargs)
        if "offset_mapping" in batch:
            batch["offset_mapping"] = [
                [(max(0, a - len(front)), max(0, b - len(front))) for a, b in offsets]
                for front, offsets in zip(fronts, batch["offset_mapping"], strict=True)
            ]
        return {name: values[0] for name, values in batch.items()} if single else batch

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing is put in front."""
        self.on = False
        try:
            yield
        finally:
            self.on = True


def measure(
    base: Base,
    facts: Sequence[Fact],
    unrelated: Sequence[Fact],
    unedited: Callable[[], AbstractContextManager[None]],
    batch_size: int,
) -> dict[str, Any]:
    """The metrics of one arm, its edits in force."""
    shared = {"unedited": unedited, "batch_size": batch_size}
    found: dict[str, Any] = percent(evaluate(base, facts, mode="both", metrics=METRICS, **shared))
    others = evaluate(base, unrelated, mode="teacher_forced", metrics=["same_subject"], **shared).summary()
    return found | {"unrelated, tokens": round(100 * others["same_subject.tokens"].mean, 1)}


def generation_cost(model: Any, prompts: Sequence[str], runs: int, tokens: int) -> float:
    """How long the model takes to go on behind prompts, relative to the model without edits: median of paired runs."""

    def seconds() -> float:
        started = time.perf_counter()
        model.ask(prompts, max_new_tokens=tokens)
        return time.perf_counter() - started

    ratios = []
    seconds()
    for _ in range(runs):
        edited = seconds()
        with model.disable_edits():
            ratios.append(edited / seconds())
    return statistics.median(ratios)


def without_wordings(facts: Sequence[Fact], asked: Sequence[Fact]) -> list[Fact]:
    """Facts without the rephrases and questions that, but for the subject, are word for word one of those asked."""

    def wordings(fact: Fact) -> dict[str, str]:
        return {text: fold(text.replace(fact.subject, "{}")) for text in (*fact.rephrases, *(q.prompt for q in fact.locality))}

    measured = {wording for fact in asked for wording in wordings(fact).values()}
    return [
        replace(
            fact,
            rephrases=tuple(r for r in fact.rephrases if own[r] not in measured),
            locality=tuple(q for q in fact.locality if own[q.prompt] not in measured),
        )
        for fact in facts
        for own in [wordings(fact)]
    ]


def run_arm(arm: str, model: Any, facts: list[Fact], unrelated: Sequence[Fact], options: argparse.Namespace) -> dict[str, Any]:
    """One arm at one size."""
    step = max(1, len(facts) // options.evaluated)
    asked = facts[::step][: options.evaluated]
    scope = Scope([[f.subject, *f.aliases] for f in facts])
    found: dict[str, Any] = {"arm": arm, "facts": len(facts), "evaluated": len(asked)}
    found["fires"] = round(100 * sum(bool(scope.find(f.question)) for f in unrelated) / len(unrelated), 1)
    if arm == "prompt":
        tokenizer = FactInFront(model.tokenizer, facts)
        base = Base(model.get_base_model(), tokenizer)
        return found | {"seconds": 0.0, **measure(base, asked, unrelated, tokenizer.silent, options.batch_size)}
    own = {"lks": options.settings, "released": {"generator": "linear"}}.get(arm, {})
    given = facts
    if arm == "lks" and options.rephrases:
        own = {"train_on_rephrases": True, **own}
        kept = {f.id for f in asked}
        given = [replace(f, rephrases=(), locality=()) if f.id in kept else f for f in without_wordings(facts, asked)]
        found["given wordings"] = sum(bool(f.rephrases) and bool(f.locality) for f in given)
    started = time.perf_counter()
    model.edit(given, "memit" if arm == "memit" else "lks", verify=False, seed=options.seed, **own)
    found["seconds"] = round(time.perf_counter() - started, 1)
    try:
        if options.output is not None:
            model.save_pretrained(options.output / f"{arm}-{len(facts)}")
        base = Base(model.get_base_model(), model.tokenizer)
        found |= measure(base, asked, unrelated, model.disable_edits, options.batch_size)
        found["perplexity"] = round(model.perplexity(), 2)
        if options.text:
            found["perplexity, given text"] = round(perplexity(model, options.text.read_text("utf-8").splitlines()), 2)
        if options.runs:
            prompts = [f.question for f in asked[: options.prompts]]
            found["generation"] = round(generation_cost(model, prompts, options.runs, options.tokens), 3)
    finally:
        model.rollback()
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="FACTS")
    parser.add_argument("--model", help="id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument(
        "--sizes", default="10,100,1000,10000", help="numbers of facts; those that the file has not are left out"
    )
    parser.add_argument("--arms", default=",".join(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--memit-most", type=int, default=300, help="facts beyond which memit is left out (default: 300)")
    parser.add_argument("--evaluated", type=int, default=500, help="facts that are asked at most (default: 500)")
    parser.add_argument("--unrelated", type=int, default=200, help="rows at the end of the file that are unrelated prompts")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the arm lks; repeatable")
    parser.add_argument("--rephrases", action="store_true", help="train on the wordings of facts that are not asked")
    parser.add_argument("--runs", type=int, default=20, help="paired runs for the cost of generation; 0 leaves it out")
    parser.add_argument("--tokens", type=int, default=20, help="tokens that are generated in each of them (default: 20)")
    parser.add_argument("--prompts", type=int, default=8, help="prompts in each of them (default: 8)")
    parser.add_argument("--text", type=Path, help="ordinary text, a text a line, for a second perplexity")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a forward of the evaluation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for table.md and results.json, which resumes")
    options = parser.parse_args(arguments)
    options.arms = options.arms.split(",")
    if unknown := set(options.arms) - set(ARMS):
        parser.error(f"there is no arm {sorted(unknown)[0]!r}; there are: {', '.join(ARMS)}")
    options.settings = settings(options.set)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    facts, unrelated = read(options.path, options.unrelated)
    model = EditableModelForCausalLM.from_pretrained(options.model or smollm2(), dtype=torch.float32)
    path = options.output / "results.json" if options.output else None
    results: dict[str, dict[str, Any]] = {}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    rows = []
    sizes = [size for size in map(int, options.sizes.split(",")) if size <= len(facts)]
    if not sizes:
        raise SystemExit(f"{options.path} has {len(facts)} facts besides the unrelated prompts; see --sizes")
    for size in sizes:
        for arm in options.arms:
            if arm == "memit" and size > options.memit_most:
                continue
            given = [
                arm,
                [f.to_dict() for f in facts[:size]],
                [f.to_dict() for f in unrelated],
                options.evaluated,
                options.seed,
            ]
            own = [options.settings if arm == "lks" else {}, options.runs, options.tokens, options.prompts]
            own += [str(options.text), str(options.model), options.rephrases and arm == "lks"]
            key = hashlib.sha256(json.dumps([given, own]).encode()).hexdigest()[:24]
            if key not in results:
                results[key] = run_arm(arm, model, facts[:size], unrelated, options)
                if path is not None:
                    with atomic_path(path) as whole:
                        whole.write_text(json.dumps(results, indent=1), encoding="utf-8")
            rows.append(results[key])
            print(json.dumps(results[key]), file=sys.stderr, flush=True)
    print(markdown(rows))
    if path is not None:
        with atomic_path(path.with_name("table.md")) as whole:
            whole.write_text(markdown(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
