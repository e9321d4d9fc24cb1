"""Whether what follows from an edit follows it: portability, in a world where the model can make the inference.

    python examples/benchmarks/portability.py [--facts 60] [--layer 1] [--sweep] [--json PATH] [--output FOLDER]

The model of `made_up_world.py` (trained on the first run) answers "The country where X lives is" for people about whom no
such question was ever trained. Each edit moves one of these people to another city and is rolled back before the next. The
plain editor is compared with STEAM, whose anchors come from other people who live in the new city, and with two controls
that tell a semantic gain from that of any further term: anchors of a wrong city, and of an object of another relation.

Every arm takes the same steps. Differences are paired over facts, with 95 % intervals from 2,000 bootstrap resamples.
Exact: every token of the object is the first choice. NLL: mean over the object's tokens. Unchanged is counted over what the
clean model answers rightly. Two things stand beside the arms: the unedited model, and by block what a transplant reaches:
the state of a resident of the new city, put in the place of the subject's, as far as any edit of the subject's last token
could go there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from made_up_world import (
    ONE_HOP,
    TWO_HOP,
    Statement,
    World,
    accuracy_table,
    add_recipe,
    ask,
    encoded,
    recipe_of,
    trained_world,
)

from hf_edit import EditableModelForCausalLM, Fact
from hf_edit.layout import find_layout
from hf_edit.progress import bar
from hf_edit.references import Reference
from hf_edit.suffix import hidden_of

EDITED = "home"  # the relation that is edited; its first wording is the edit's prompt, the others are its paraphrases
CHAINS = tuple(relation for relation, (bridge, _) in TWO_HOP.items() if bridge == EDITED)
RESAMPLES = 2000

Scores = dict[str, float]


# --- edits and what is asked about them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """A person moves to another city.

    Attributes:
        person, old, city: who, from where and where to.
        paraphrases: other wordings of the edited fact.
        questions: by wording, the two-hop questions with the new city's answers.
        same_subject: the person's other facts.
        neighbours: facts of others.
    """

    person: str
    old: str
    city: str
    paraphrases: tuple[Statement, ...]
    questions: tuple[tuple[Statement, ...], ...]
    same_subject: tuple[Statement, ...]
    neighbours: tuple[Statement, ...]

    @property
    def fact(self) -> Fact:
        """The edit."""
        return Fact(subject=self.person, prompt=ONE_HOP[EDITED][0], target=self.city)

    @property
    def edited(self) -> Statement:
        """The edit as a statement."""
        return Statement(EDITED, self.person, ONE_HOP[EDITED][0], self.city, 1)


def choose_moves(model: EditableModelForCausalLM, world: World, count: int, seed: int, neighbours: int = 40) -> list[Move]:
    """Edits of people about whom no two-hop question was trained and whose city the clean model knows in every wording.

    A two-hop question counts where the clean model answers it rightly and the new city has another answer to it; people
    who have no such question in either wording are left out.
    """
    rng = random.Random(seed)
    statements = world.one_hop + world.two_hop
    right = {s for s, answer in zip(statements, ask(model, model.tokenizer, statements), strict=True) if answer.exact}
    by_subject: dict[str, list[Statement]] = {person: [] for person in world.entities["person"]}
    for statement in statements:
        by_subject.setdefault(statement.subject, []).append(statement)
    moves: list[Move] = []
    for person in rng.sample(sorted(world.unquestioned), len(world.unquestioned)):
        own = by_subject[person]
        home = [s for s in own if s.relation == EDITED]
        old = world.facts[EDITED, person]
        city = rng.choice([c for c in world.entities["city"] if c != old])
        moved = [replace(s, object=world.facts[s.relation, city]) for s in own if s.relation in CHAINS and s in right]
        moved = [s for s in moved if s.object != world.answer(s.relation, person)]
        questions = tuple(tuple(s for s in moved if s.wording == TWO_HOP[s.relation][1][i]) for i in range(2))
        if not right.issuperset(home) or not all(questions):
            continue
        others = rng.sample([s for s in statements if s.subject != person], 2 * neighbours)
        moves.append(
            Move(
                person,
                old,
                city,
                tuple(replace(s, object=city) for s in home[1:]),
                questions,
                tuple(s for s in own if s.relation != EDITED and s.relation not in CHAINS and s in right),
                tuple([s for s in others if s in right][:neighbours]),
            )
        )
    return moves[:count]


def scores(model: EditableModelForCausalLM, world: World, move: Move) -> Scores:
    """What a model, with the edit in force, makes of everything that is asked about it."""
    stale = tuple(replace(s, object=world.facts[s.relation, move.old]) for s in (*move.questions[0], *move.questions[1]))
    groups = {
        "efficacy": (move.edited,),
        "paraphrase": move.paraphrases,
        "portability A": move.questions[0],
        "portability B": move.questions[1],
        "old answer": stale,
        "same subject": move.same_subject,
        "neighbours": move.neighbours,
    }
    answers = iter(ask(model, model.tokenizer, [s for group in groups.values() for s in group]))
    found: Scores = {}
    for name, group in groups.items():
        own = [next(answers) for _ in group]
        found[name] = statistics.fmean(a.exact for a in own)
        found[f"{name} NLL"] = statistics.fmean(a.nll for a in own)
    return found


# --- arms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A way to make an edit: a method, its settings, and where STEAM's references come from."""

    name: str
    method: str
    settings: dict[str, Any]
    source: Callable[[Move], Callable[[str], list[Reference]]] | None = None


class Sources:
    """Where an edit's references come from: people with the same object, or, as a control, with another one."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.seed = seed

    def new_city(self, move: Move) -> Callable[[str], list[Reference]]:
        """Residents of the new city."""
        return lambda obj: self._about(EDITED, obj, move)

    def wrong_city(self, move: Move) -> Callable[[str], list[Reference]]:
        """Residents of a city that is neither the new one nor the old one."""
        cities = [c for c in self.world.entities["city"] if c not in (move.city, move.old)]
        return lambda obj: self._about(EDITED, self._any(cities, move), move)

    def other_relation(self, move: Move) -> Callable[[str], list[Reference]]:
        """People who work for some company."""
        return lambda obj: self._about("employer", self._any(self.world.entities["company"], move), move)

    def _any(self, names: Sequence[str], move: Move) -> str:
        return random.Random(f"{self.seed} {move.person}").choice(names)

    def _about(self, relation: str, obj: str, move: Move) -> list[Reference]:
        people = [s for (r, s), o in self.world.facts.items() if r == relation and o == obj and s != move.person]
        return [Reference(wording, s, (wording,), obj) for wording in ONE_HOP[relation] for s in people]


def main_arms(world: World, layer: int, editing: dict[str, Any], seed: int, **steam: Any) -> list[Arm]:
    """The comparison: base editors, STEAM on ROME, and its controls."""
    shared = {"layers": (layer,), **editing}
    sources = Sources(world, seed)
    return [
        Arm("ROME", "steam", {**shared, "anchor_weight": 0.0}),
        Arm("MEMIT", "steam", {**shared, "anchor_weight": 0.0, "base_editor": "memit"}),
        Arm("STEAM", "steam", {**shared, **steam}, sources.new_city),
        Arm("STEAM, wrong city", "steam", {**shared, **steam}, sources.wrong_city),
        Arm("STEAM, other relation", "steam", {**shared, **steam}, sources.other_relation),
    ]


def sweep_arms(world: World, layer: int, blocks: int, editing: dict[str, Any], seed: int) -> list[Arm]:
    """ROME, and STEAM's settings of the alignment one by one around the default."""
    source = Sources(world, seed).new_city
    shared = {"layers": (layer,), **editing}
    above = tuple(range(layer + 1, blocks))
    half = len(above) // 2
    settings: dict[str, dict[str, Any]] = {
        f"{frame}, weight {weight:g}": {"anchor_frame": frame, "anchor_weight": weight, "anchor_blocks": above}
        for frame, weight in product(("raw", "centred"), (1.0, 4.0, 16.0))
    }
    for name, band in (("lower", above[:half]), ("upper", above[half:]), ("found", "found")):
        settings[f"centred, weight 4, {name} blocks"] = {"anchor_blocks": band}
    for weight in (0.25, 1.0, 4.0):
        settings[f"contrastive, weight {weight:g}"] = {
            "alignment": "contrastive",
            "anchor_weight": weight,
            "anchor_blocks": above,
        }
    for ratio in (0.5, 1.0, 2.0):
        settings[f"centred, gradient ratio {ratio:g}"] = {"anchor_ratio": ratio, "anchor_blocks": above}
    plain = Arm("ROME", "steam", {**shared, "anchor_weight": 0.0})
    return [plain, *(Arm(name, "steam", {**shared, **own}, source) for name, own in settings.items())]


def run(model: EditableModelForCausalLM, world: World, moves: Sequence[Move], arms: Sequence[Arm]) -> dict[str, list[Scores]]:
    """Scores by arm, a fact each; single edits, each rolled back before the next."""
    found: dict[str, list[Scores]] = {"unedited": [scores(model, world, move) for move in moves]}
    with bar(len(arms) * len(moves), "editing", "edit") as shown:
        for arm in arms:
            found[arm.name] = []
            for move in moves:
                source = {"references": arm.source(move)} if arm.source else {}
                model.edit(move.fact, method=arm.method, verify=False, progress=False, **arm.settings, **source)
                found[arm.name].append(scores(model, world, move))
                model.rollback()
                shown.update()
    return found


def transplants(model: EditableModelForCausalLM, world: World, moves: Sequence[Move]) -> list[Scores]:
    """By block, exact answers where the subject's last token has the state of a resident of the new city in the same prompt."""
    residents = {city: person for (relation, person), city in world.facts.items() if relation == EDITED}
    groups = {"paraphrase": [(m, s) for m in moves for s in m.paraphrases]}
    groups |= {f"portability {'AB'[i]}": [(m, s) for m in moves for s in m.questions[i]] for i in range(2)}
    found: list[Scores] = []
    for block in find_layout(model.base_model).blocks:
        found.append({})
        for name, pairs in groups.items():
            donors = [replace(s, subject=residents[m.city]) for m, s in pairs]
            states: list[torch.Tensor] = []
            with _at_subjects(model, block, donors, lambda state, kept=states: kept.append(state.clone())):
                ask(model, model.tokenizer, donors, batch=len(donors))
            statements = [s for _, s in pairs]
            with _at_subjects(model, block, statements, lambda state, kept=states: kept[0]):
                answers = ask(model, model.tokenizer, statements, batch=len(statements))
            found[-1][name] = statistics.fmean(a.exact for a in answers)
    return found


@contextmanager
def _at_subjects(
    model: EditableModelForCausalLM,
    block: torch.nn.Module,
    statements: Sequence[Statement],
    change: Callable[[torch.Tensor], torch.Tensor | None],
) -> Iterator[None]:
    """Give a block's states at the subjects' last tokens, [statements, hidden], to a function, and put in what it returns."""
    places = [t.subject for t in encoded(model.tokenizer, statements)]

    def hook(_: Any, __: Any, output: Any) -> None:
        states = hidden_of(output)
        rows = range(len(places))
        changed = change(states[rows, places])
        if changed is not None:
            states[rows, places] = changed

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- what came out ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A paired difference of means over facts, with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, ones: Sequence[float], others: Sequence[float]) -> Difference:
        """The mean of `ones` minus `others`, fact by fact."""
        paired = torch.tensor(ones, dtype=torch.float64) - torch.tensor(others, dtype=torch.float64)
        chosen = torch.randint(len(paired), (RESAMPLES, len(paired)), generator=torch.Generator().manual_seed(0))
        low, high = paired[chosen].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(paired.mean().item(), low, high)

    def show(self, percent: bool) -> str:
        """As a cell; in bold where the interval leaves out zero."""
        text = (
            f"{100 * self.mean:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
            if percent
            else f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"
        )
        return f"**{text}**" if self.low > 0 or self.high < 0 else text


SHARES = ("efficacy", "paraphrase", "portability A", "portability B", "old answer", "same subject", "neighbours")
NLLS = ("paraphrase NLL", "portability A NLL", "portability B NLL")


def means_table(found: dict[str, list[Scores]]) -> str:
    """Means over facts: shares in per cent, NLLs in nats."""
    lines = [f"| arm | {' | '.join((*SHARES, *NLLS))} |", "|---" * (1 + len(SHARES) + len(NLLS)) + "|"]
    for arm, rows in found.items():
        means = {name: statistics.fmean(row[name] for row in rows) for name in (*SHARES, *NLLS)}
        cells = [f"{100 * means[n]:.1f}" for n in SHARES] + [f"{means[n]:.2f}" for n in NLLS]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(found: dict[str, list[Scores]], base: str) -> dict[str, dict[str, Difference]]:
    """Each arm minus the base arm, and STEAM minus its controls, for everything that is measured."""
    pairs = [(arm, base) for arm in found if arm not in (base, "unedited")]
    pairs += [("STEAM", arm) for arm in found if arm.startswith("STEAM, ") and "STEAM" in found and base == "ROME"]
    return {
        f"{one} - {other}": {
            name: Difference.of([row[name] for row in found[one]], [row[name] for row in found[other]])
            for name in (*SHARES, *NLLS)
        }
        for one, other in pairs
    }


def differences_table(found: dict[str, dict[str, Difference]]) -> str:
    """Differences with their intervals: shares in points, NLLs in nats."""
    shown = ("paraphrase", "portability A", "portability B", "same subject", *NLLS)
    lines = [f"| difference | {' | '.join(shown)} |", "|---" * (1 + len(shown)) + "|"]
    for pair, by_name in found.items():
        lines.append(f"| {pair} | {' | '.join(by_name[n].show('NLL' not in n) for n in shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--facts", type=int, default=60, help="edits (default: 60)")
    parser.add_argument("--layer", type=int, default=1, help="the block to edit (default: 1)")
    parser.add_argument("--edit-steps", type=int, default=20, help="steps of each value optimisation (default: 20)")
    parser.add_argument("--clamp", type=float, default=3.0, help="|delta| at most, relative to the stream (default: 3)")
    parser.add_argument("--anchor-weight", type=float, default=4.0)
    parser.add_argument("--anchor-ratio", type=float, help="the gradient's ratio, in the weight's place")
    parser.add_argument("--anchor-blocks", type=int, nargs="+", help="by default the middle third, above the edited block")
    parser.add_argument("--raw", action="store_true", help="align without taking off the mean state")
    parser.add_argument("--sweep", action="store_true", help="settings of the alignment instead of the comparison")
    parser.add_argument("--json", type=Path, help="write everything here, each fact's scores too")
    add_recipe(parser)
    arguments = parser.parse_args()

    world, folder, trained = trained_world(recipe_of(arguments), arguments.output)
    print(accuracy_table(trained))
    model = EditableModelForCausalLM.from_pretrained(folder)
    moves = choose_moves(model, world, arguments.facts, arguments.seed)
    if not moves:
        sys.exit("The model makes no two-hop inference about people never asked about; train it for longer (--steps).")
    questions = sum(len(wording) for move in moves for wording in move.questions)
    print(f"\n{len(moves)} single edits, {questions} two-hop questions about their consequences\n")
    reached = transplants(model, world, moves)
    print("| a resident's state after block | paraphrase | portability A | portability B |\n|---|---|---|---|")
    for block, row in enumerate(reached):
        print(f"| {block} | {' | '.join(f'{100 * value:.1f}' for value in row.values())} |")

    editing = {"steps": arguments.edit_steps, "clamp": arguments.clamp}
    if arguments.sweep:
        arms = sweep_arms(world, arguments.layer, len(reached), editing, arguments.seed)
    else:
        steam: dict[str, Any] = {
            "anchor_weight": arguments.anchor_weight,
            "anchor_ratio": arguments.anchor_ratio,
            "anchor_frame": "raw" if arguments.raw else "centred",
        }
        if arguments.anchor_blocks:
            steam["anchor_blocks"] = tuple(arguments.anchor_blocks)
        arms = main_arms(world, arguments.layer, editing, arguments.seed, **steam)
    found = run(model, world, moves, arms)
    compared = differences(found, "ROME")
    print(f"\n{means_table(found)}\n\n{differences_table(compared)}")
    if arguments.json:
        record = {
            "trained": trained,
            "moves": [{"person": m.person, "old": m.old, "new": m.city} for m in moves],
            "transplants": reached,
            "settings": {arm.name: arm.settings for arm in arms},
            "scores": found,
            "differences": {pair: {n: vars(d) for n, d in by_name.items()} for pair, by_name in compared.items()},
        }
        arguments.json.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
