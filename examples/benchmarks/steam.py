"""STEAM against its controls at equal steps: does the pull towards semantic anchors help, and is it the anchors that do it?

    python examples/benchmarks/steam.py RECORDS [--mode single] [--rows 100] [--arms base,steam,random,wrong] [--output DIR]

RECORDS is a .jsonl file of CounterFactPlus (arXiv 2305.14956): CounterFact records, each with a portability question. The
arms differ in one thing only, what a value is pulled towards:

    clean   nothing is edited
    base    the base editor alone (`anchor_weight=0`)
    steam   the anchors of the fact's new object
    random  the anchors of another object that shares no relation with it, drawn by lot
    wrong   the anchors of another object of the same relation: what only the relation explains is no gain of the object's

An object's references that the clean model recalls are split in two by lot. Anchors are made of one half, the cosine is
measured to the other. An object with too few references has no anchor in any arm; its facts count among all records and are
left out where arms are compared. Differences are paired by record, with bootstrap intervals.

With --output, finished groups are kept and not computed again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import settings
from smollm2 import smollm2
from tqdm.auto import tqdm

from hf_edit import EditableModelForCausalLM, Fact, SteamConfig
from hf_edit.alignment import ReferenceStates, general_references, reference_cosines, reference_states, score_references
from hf_edit.cache import atomic_path
from hf_edit.evaluation import CleanAnswers, bootstrap, paired_bootstrap
from hf_edit.references import Reference, bank

ARMS = ("clean", "base", "steam", "random", "wrong")
COMPARED = (("steam", "base"), ("steam", "random"), ("steam", "wrong"))
NEAR = 10  # a reference is recalled where its object's first token is among the model's first ten
ENOUGH = 10  # records, with fewer of which an interval says little
TEXT_METRICS = ("fluency", "consistency")


@dataclass(frozen=True)
class Record:
    """A fact with what CounterFact knows about it beyond `Fact`."""

    fact: Fact
    relation: str
    generation_prompts: tuple[str, ...]
    reference_texts: tuple[str, ...]


def read_records(path: Path, rows: int | None) -> list[Record]:
    """The file's records; of several that ask the same thing, the first.

    CounterFact's own reference texts are Wikipedia articles that its files do not hold. Here they are the attribute
    prompts, which ask the same relation of subjects that share the new object, each followed by that object.
    """
    found: dict[tuple[str, str], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        fact = Fact.from_dict(raw)
        texts = tuple(f"{prompt} {fact.target}." for prompt in raw.get("attribute_prompts", ()))
        prompts = tuple(dict.fromkeys(raw.get("generation_prompts", ())))
        found.setdefault(fact.key, Record(fact, raw["requested_rewrite"].get("relation_id", ""), prompts, texts))
    return list(found.values())[:rows]


class Anchoring:
    """Which references each object is anchored to in each arm, and those held out."""

    def __init__(self, model: Any, records: Sequence[Record], config: SteamConfig, seed: int) -> None:
        self._model, self._seed = model, seed
        self._least = config.min_references
        self._subjects = [r.fact.subject.casefold() for r in records]
        self._halves: dict[str, tuple[list[Reference], list[Reference]]] = {}
        self._relations: dict[str, set[str]] = {}
        for record in records:
            for obj in (record.fact.target, record.fact.target_old):
                if obj:
                    self._relations.setdefault(obj.casefold(), set()).add(record.relation)
        self._old: dict[str, set[str]] = {}
        for record in records:
            self._old.setdefault(record.fact.target.casefold(), set()).add((record.fact.target_old or "").casefold())

    def anchors(self, obj: str) -> list[Reference]:
        """The half that anchors are made of; empty where it is too small to make one."""
        half = self._split(obj)[0]
        return half if len(half) >= self._least else []

    def held_out(self, obj: str) -> list[Reference]:
        """The half that the cosine is measured to, where the object has an anchor."""
        return self._split(obj)[1] if self.anchors(obj) else []

    def random(self, obj: str) -> list[Reference]:
        """The anchors of another object with which it shares no relation, in the records or in the bank."""
        relations = {r.relation for r in bank().get(obj.casefold(), ())}
        own = self._relations.get(obj.casefold(), set())
        candidates = [
            other
            for other, group in bank().items()
            if relations.isdisjoint(r.relation for r in group) and own.isdisjoint(self._relations.get(other, set()))
        ]
        return self._control(obj, candidates, "random")

    def wrong(self, obj: str) -> list[Reference]:
        """The anchors of another object of the same relation of the records, neither the new nor the old one."""
        own = self._relations.get(obj.casefold(), set())
        barred = {obj.casefold(), *self._old.get(obj.casefold(), ())}
        candidates = [o for o, relations in self._relations.items() if not own.isdisjoint(relations) and o not in barred]
        return self._control(obj, candidates, "wrong")

    def source(self, arm: str) -> Any:
        """The reference source of an arm, for `SteamConfig.references`; a variant of STEAM has STEAM's."""
        return {"random": self.random, "wrong": self.wrong}.get(arm, self.anchors)

    def _control(self, obj: str, candidates: Sequence[str], arm: str) -> list[Reference]:
        if not self.anchors(obj):
            return []
        drawn = sorted(candidates)
        random.Random(f"{self._seed}:{arm}:{obj.casefold()}").shuffle(drawn)
        return next((found for other in drawn if (found := self.anchors(other))), [])

    def _split(self, obj: str) -> tuple[list[Reference], list[Reference]]:
        """The recalled references in two halves; none mentions a subject that any record edits."""
        key = obj.casefold()
        if key not in self._halves:
            pool = [r for r in bank().get(key, ()) if not self._edited(r)]
            if len(pool) < self._least:
                self._halves[key] = ([], [])
            else:
                with self._model.disable_edits():
                    scores = score_references(self._model, pool)
                recalled = [r for r, score in zip(pool, scores, strict=True) if score.rank < NEAR]
                random.Random(f"{self._seed}:{key}").shuffle(recalled)
                self._halves[key] = (recalled[0::2], recalled[1::2])
        return self._halves[key]

    def _edited(self, reference: Reference) -> bool:
        text = reference.prompts[0].replace("{}", reference.subject).casefold()
        return any(subject in text for subject in self._subjects)


class Finished:
    """Results of finished groups, a line each; with a file, they outlive the run."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._results: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            for line in lines:
                try:
                    result = json.loads(line)
                except json.JSONDecodeError:  # the run ended while it wrote this line
                    continue
                self._results[result["key"]] = result
            with atomic_path(path) as whole:
                whole.write_text("".join(json.dumps(r) + "\n" for r in self._results.values()), encoding="utf-8")

    def get(self, key: str) -> dict[str, Any] | None:
        return self._results.get(key)

    def add(self, result: dict[str, Any]) -> None:
        self._results[result["key"]] = result
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
                file.flush()
                os.fsync(file.fileno())


@dataclass
class Benchmark:
    """One run: the same groups of records through every arm."""

    model: Any
    records: list[Record]
    config: SteamConfig
    options: argparse.Namespace
    anchoring: Anchoring
    finished: Finished
    identity: str
    clean: CleanAnswers | None = None
    held: ReferenceStates | None = None

    def run(self) -> list[dict[str, Any]]:
        """The results of all arms and groups, those of earlier runs included."""
        size = 1 if self.options.mode == "single" else self.options.batch
        groups = [self.records[i : i + size] for i in range(0, len(self.records), size)]
        results = []
        self._read_held_out()
        with tqdm(total=len(groups) * len(self.options.arms), unit="group", dynamic_ncols=True) as shown:
            for group in groups:
                for arm in self.options.arms:
                    ids = [str(r.fact.id) for r in group]
                    key = hashlib.sha256(json.dumps([self.identity, arm, ids]).encode()).hexdigest()[:24]
                    result = self.finished.get(key)
                    if result is None:
                        result = {"key": key, "arm": arm, **self._group(arm, group)}
                        self.finished.add(result)
                    results.append(result)
                    shown.update(1)
        return results

    def _read_held_out(self) -> None:
        """All records' held-out references, once: no arm can change what the clean model says of them."""
        references = [self.anchoring.held_out(r.fact.target) for r in self.records]
        self.held = reference_states(self.model, references, general=general_references())

    def _group(self, arm: str, group: Sequence[Record]) -> dict[str, Any]:
        facts = [r.fact for r in group]
        controlled = arm not in ("clean", "base")
        found = [bool(self.anchoring.source(arm)(f.target)) if controlled else True for f in facts]  # drawn ahead of the clock
        started = time.perf_counter()
        if arm == "base":
            self._edit(facts, anchor_weight=0.0)
        elif arm != "clean":
            self._edit(facts, references=self.anchoring.source(arm), **self.options.variants.get(arm, {}))
        seconds = time.perf_counter() - started
        try:
            rows = self._measure(group)
        finally:
            self.model.rollback()
        for fact, control in zip(facts, found, strict=True):
            # a control that could not be found leaves the fact without an anchor in this arm
            rows[str(fact.id)]["anchored"] = float(control and bool(self.anchoring.anchors(fact.target)))
        return {"rows": rows, "seconds": seconds}

    def _edit(self, facts: Sequence[Fact], **settings: Any) -> None:
        self.model.edit(facts, "steam", config=self.config, verify=False, progress=False, seed=self.options.seed, **settings)

    def _measure(self, group: Sequence[Record]) -> dict[str, dict[str, float]]:
        facts = [r.fact for r in group]
        shared = {"progress": False, "batch_size": self.options.batch_size}
        forced = self.model.evaluate(facts, mode="teacher_forced", clean=self.clean, **shared)
        self.clean = forced.clean or self.clean
        metrics = ["efficacy", *(["paraphrase"] if any(f.rephrases for f in facts) else []), "repetition"]
        texts = self.options.text_tokens > 0 and all(r.generation_prompts and r.reference_texts for r in group)
        free = self.model.evaluate(
            facts,
            metrics=[*metrics, *(TEXT_METRICS if texts else ())],
            mode="generate",
            text_tokens=max(1, self.options.text_tokens),
            generation_prompts={str(r.fact.id): r.generation_prompts for r in group},
            # how rare a word is must not depend on the group
            reference_texts={str(r.fact.id): r.reference_texts for r in self.records},
            clean=self.clean,
            **shared,
        )
        self.clean = free.clean or self.clean
        rows = {str(a.fact.id): {**a.scores, **b.scores} for a, b in zip(forced, free, strict=True)}
        assert self.held is not None
        first = self.records.index(group[0])
        held = replace(self.held, means=self.held.means[first : first + len(group)])
        cosines = reference_cosines(self.model, facts, held, self.options.batch_size)
        depth = len(cosines.blocks)
        thirds = {
            "middle third": slice(round(depth / 3), round(2 * depth / 3)),
            "last third": slice(round(2 * depth / 3), depth),
        }
        for fact, centred, raw in zip(facts, cosines.centred, cosines.raw, strict=True):
            if not bool(centred.isnan().any()):
                for name, part in thirds.items():
                    rows[str(fact.id)][f"cosine.centred, {name}"] = float(centred[part].mean())
                    rows[str(fact.id)][f"cosine.raw, {name}"] = float(raw[part].mean())
        return rows


def by_arm(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Each arm's numbers, by record."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for result in results:
        found.setdefault(result["arm"], {}).update(result["rows"])
    return found


def means(arms: Mapping[str, Mapping[str, Mapping[str, float]]], anchored: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """By metric, each arm's mean, its interval and the number of records."""
    names = dict.fromkeys(n for rows in arms.values() for row in rows.values() for n in row if n != "anchored")
    for name in names:
        line = {}
        for arm, rows in arms.items():
            values = [row[name] for row in rows.values() if name in row and (row["anchored"] or not anchored)]
            if values:
                line[arm] = {**bootstrap(values)._asdict(), "count": len(values)}
        if line:
            yield name, line


def differences(arms: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """By metric, one arm less the other over the records that have an anchor in both."""
    names = dict.fromkeys(n for rows in arms.values() for row in rows.values() for n in row if n != "anchored")
    for name in names:
        line = {}
        for one, other in compared(arms):
            ids = [
                i
                for i, row in arms[one].items()
                if i in arms[other]
                and row["anchored"]
                and arms[other][i]["anchored"]
                and name in row
                and name in arms[other][i]
            ]
            if ids:
                pair = paired_bootstrap([arms[one][i][name] for i in ids], [arms[other][i][name] for i in ids])
                line[f"{one} - {other}"] = {**pair._asdict(), "count": len(ids)}
        if line:
            yield name, line


def compared(arms: Collection[str]) -> list[tuple[str, str]]:
    """The pairs of arms whose differences are shown: a variant of STEAM stands beside the base."""
    pairs = [*COMPARED, *((arm, "base") for arm in arms if arm not in ARMS)]
    return [(one, other) for one, other in pairs if one in arms and other in arms]


def table(lines: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str], interval: bool) -> list[str]:
    """Markdown; an interval that is clear of zero makes its difference bold, where there are enough records to have one."""
    if not lines:
        return ["No record has what this table needs."]
    shown = [f"| metric | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, line in lines:
        cells = []
        for column in columns:
            cell = line.get(column)
            if cell is None:
                cells.append("")
            elif interval:
                text = f"{cell['mean']:+.3f}"
                clear = cell["count"] >= ENOUGH and (cell["low"] > 0 or cell["high"] < 0)
                cells.append(f"{f'**{text}**' if clear else text} [{cell['low']:+.3f}, {cell['high']:+.3f}]")
            else:
                cells.append(f"{cell['mean']:.3f}")
        counts = sorted({cell["count"] for cell in line.values()})
        shown.append(f"| {name} ({'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}) | {' | '.join(cells)} |")
    return shown


def markdown(results: Sequence[Mapping[str, Any]], options: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    arms = by_arm(results)
    seconds = {arm: sum(r["seconds"] for r in results if r["arm"] == arm) for arm in arms}
    count = len(next(iter(arms.values())))
    pairs = [f"{one} - {other}" for one, other in compared(arms)]
    size = "one at a time" if options.mode == "single" else f"in batches of {options.batch}"
    return "\n".join(
        [
            f"# STEAM and its controls: {count} records, edited {size}",
            "",
            f"Seed {options.seed}. Settings of all arms: `{json.dumps(settings, sort_keys=True)}`.",
            "Seconds of editing: " + ", ".join(f"{arm} {s:.1f}" for arm, s in seconds.items() if arm != "clean") + ".",
            "In brackets the number of records. Portability questions in two forms, A and B (see `hf_edit.metrics`).",
            "",
            "## All records",
            "",
            *table(list(means(arms, anchored=False)), list(arms), interval=False),
            "",
            "## Records whose object has an anchor",
            "",
            *table(list(means(arms, anchored=True)), list(arms), interval=False),
            "",
            "## Paired differences, records with an anchor in both arms, 95 % bootstrap intervals",
            "",
            *(table(list(differences(arms)), pairs, interval=True) if pairs else ["Needs steam and another arm."]),
            "",
        ]
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, metavar="RECORDS")
    parser.add_argument("--model", help="id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--mode", choices=("single", "batch"), default="single", help="one fact at a time, or many at once")
    parser.add_argument("--batch", type=int, default=100, help="facts edited at once in mode batch (default: 100)")
    parser.add_argument("--rows", type=int, help="records (default: all)")
    parser.add_argument("--anchored", action="store_true", help="only records whose object has an anchor")
    parser.add_argument("--arms", default=",".join(ARMS[1:]), help=f"of {', '.join(ARMS)}; clean always runs")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of all arms; repeatable")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=VALUE;...",
        help="one more arm: steam with these settings; repeatable",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-tokens", type=int, default=60, help="of texts for fluency and consistency; 0 leaves them out")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in a forward of the evaluation")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for table.md, results.json and what is finished")
    options = parser.parse_args(arguments)
    wanted = options.arms.split(",")
    if unknown := set(wanted) - set(ARMS):
        parser.error(f"there is no arm {sorted(unknown)[0]!r}; there are: {', '.join(ARMS)}")
    options.variants = {f"steam {text}": given_settings(text.split(";")) for text in options.variant}
    options.arms = [arm for arm in ARMS if arm == "clean" or arm in wanted] + list(options.variants)
    if options.batch < 1 or (options.rows is not None and options.rows < 1):
        parser.error("--batch and --rows must be at least 1")
    return options


def given_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings of an arm."""
    found = settings(pairs)
    if "references" in found:
        sys.exit("the arms themselves choose the references")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    # the arms differ in references alone
    config = SteamConfig.from_dict({"in_context": False, **given_settings(options.set)})
    records = read_records(options.records, None if options.anchored else options.rows)
    model = EditableModelForCausalLM.from_pretrained(options.model or smollm2(), dtype=torch.float32)
    for own in options.variants.values():
        replace(config, **own)  # a setting that is wrong is found before hours of work
    shared = config.to_dict()
    facts = json.dumps([[r.fact.to_dict(), r.relation, r.generation_prompts, r.reference_texts] for r in records])
    clean = model.evaluate(records[0].fact, metrics=["repetition"], progress=False).clean
    assert clean is not None
    # a group's controls are drawn from all records, so what is finished belongs to just these
    identity = json.dumps(
        [shared, options.seed, options.text_tokens, clean.fingerprint, hashlib.sha256(facts.encode()).hexdigest()]
    )
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    finished = Finished(options.output / "finished.jsonl" if options.output else None)
    anchoring = Anchoring(model, records, config, options.seed)
    if options.anchored:
        records = [record for record in records if anchoring.anchors(record.fact.target)][: options.rows]
    results = Benchmark(model, records, config, options, anchoring, finished, identity, clean).run()

    text = markdown(results, options, shared)
    print(text)
    if options.output is not None:
        arms = by_arm(results)
        found = {
            "settings": shared,
            "mode": options.mode,
            "batch": 1 if options.mode == "single" else options.batch,
            "seed": options.seed,
            "records": len(records),
            "all": dict(means(arms, anchored=False)),
            "anchored": dict(means(arms, anchored=True)),
            "differences": dict(differences(arms)),
            "rows": arms,
        }
        for name, content in (("table.md", text), ("results.json", json.dumps(found, indent=1, sort_keys=True))):
            with atomic_path(options.output / name) as path:
                path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
