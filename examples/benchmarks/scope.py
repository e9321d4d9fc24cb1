"""What finding the edited names in a prompt costs and finds, beside plain ways of looking for them.

    python examples/benchmarks/scope.py FACTS [--entities 10 100 1000 10000] [--prompts 1000]

FACTS is a file of facts (.jsonl, .json, .csv). Names are the subjects of its first rows; the prompts that are timed are all its
rows', whether they name one of them or not. CPU microseconds a prompt:

- exact: `Scope.find`;
- fuzzy: the same with its second stage;
- regex: one alternation of all names between word boundaries, longest first, in any case;
- scan: `name in text`, name by name, in lower case.

Recall of exact and fuzzy on prompts that do name one, as written, in capitals, in the possessive, and with one typing mistake;
fired: the share of prompts in which something is found though none of the names stands in them as a word.
"""

from __future__ import annotations

import argparse
import random
import re
import string
import sys
import time
from collections.abc import Callable, Sequence

from hf_edit import read_facts
from hf_edit.scope import Scope

ENTITIES = (10, 100, 1000, 10_000)


def microseconds(find: Callable[[str], object], texts: Sequence[str], budget: float = 2.0) -> float:
    """The least mean CPU time of a text over several passes; a slow way only gets as many texts as fit into the budget."""
    started = time.process_time()
    find(texts[0])
    each = max(time.process_time() - started, 1e-7)
    texts = texts[: max(3, int(budget / 3 / each))]
    passes = []
    for _ in range(3):
        started = time.process_time()
        for text in texts:
            find(text)
        passes.append((time.process_time() - started) / len(texts))
    return min(passes) * 1e6


def mistyped(name: str, rng: random.Random) -> str:
    """The name with one letter too many, missing, wrong, or swapped with the next."""
    at = rng.randrange(1, len(name) - 1)
    letter = rng.choice(string.ascii_lowercase)
    return rng.choice(
        (
            name[:at] + letter + name[at:],
            name[:at] + name[at + 1 :],
            name[:at] + letter + name[at + 1 :],
            name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        )
    )


def measure(path: str, entities: Sequence[int], count: int) -> None:
    facts = read_facts(path)
    rng = random.Random(0)
    prompts = [f.question for f in rng.sample(facts, min(count, len(facts)))]
    subjects = list(dict.fromkeys(f.subject for f in facts))
    print("| names | exact | fuzzy | regex | scan |\n|---|---|---|---|---|")
    for number in sorted({min(n, len(subjects)) for n in entities}):
        names = subjects[:number]
        pattern = re.compile(r"\b(?:" + "|".join(re.escape(n) for n in sorted(names, key=len, reverse=True)) + r")\b", re.I)
        lowered = [n.lower() for n in names]
        ways = (
            Scope([[n] for n in names]).find,
            Scope([[n] for n in names], fuzzy=True).find,
            lambda text, pattern=pattern: list(pattern.finditer(text)),
            lambda text, lowered=lowered: [n for n in lowered if n in text.lower()],
        )
        cells = " | ".join(f"{microseconds(way, prompts):.1f}" for way in ways)
        print(f"| {number:,} | {cells} |", flush=True)

    half = len(subjects) // 2
    known = [[s] for s in subjects[:half]]
    scopes = {"exact": Scope(known), "fuzzy": Scope(known, fuzzy=True)}
    naming = [f for f in facts if f.subject in set(subjects[:half])][:count]
    long = [f for f in naming if len(f.subject) >= 8]
    texts = {
        "as written": [f.question for f in naming],
        "capitals": [f.question.replace(f.subject, f.subject.upper()) for f in naming if len(f.subject) > 3],
        "possessive": [f.question.replace(f.subject, f.subject + "’s") for f in naming],
        "mistyped": [f.question.replace(f.subject, mistyped(f.subject, rng)) for f in long],
    }
    others = [f.question for f in facts if f.subject in set(subjects[half:])][:count]
    others = [q for q in others if not scopes["exact"].find(q)]
    print(f"\n{half:,} names\n\n| stage | " + " | ".join(texts) + " | fired |\n" + "|---" * (len(texts) + 2) + "|")
    for name, scope in scopes.items():
        shares = [100 * sum(bool(scope.find(t)) for t in those) / len(those) for those in [*texts.values(), others]]
        print(f"| {name} | " + " | ".join(f"{s:.1f}" for s in shares) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="FACTS", help="a file of facts")
    parser.add_argument("--entities", type=int, nargs="+", default=ENTITIES, help="how many names (default: 10 to 10,000)")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts that are timed and asked (default: 1000)")
    arguments = parser.parse_args()
    measure(arguments.path, arguments.entities, arguments.prompts)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
