"""A made-up world, and a small language model trained in it until it reasons over two hops.

    python examples/benchmarks/made_up_world.py [--output FOLDER] [--seed 0] [--people 400] [--steps 1600]

Small pretrained models can't answer "the country where X lives", so whether the consequences of an edit follow it can't be
measured on them. Here people live in cities and work for companies; cities have a country, a river, a dish and a mayor,
companies a product, an owner and a colour. All names are invented. One-hop statements of everything are trained; two-hop
questions for most people only, and for those not every relation: what is left out can be answered by joining two facts
alone. The world has few cities and many people, so joining costs a model less than learning each answer by heart.

The folder holds model and tokenizer as `from_pretrained` takes them, and `world.json` with the accuracies; a second run
with the same settings reads it. `portability.py` edits this model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_edit.base import autocast
from hf_edit.cache import cache_folder
from hf_edit.positions import EncodedText, Text, encode, join, pad
from hf_edit.progress import bar

# --- the world --------------------------------------------------------------------------------------------------------

# One hop: wordings by relation, {} the subject, which the object follows. No wording may begin another one.
ONE_HOP = {
    "home": ("{} lives in", "The home of {} is in", "{} has a house in", "The city where {} lives is"),
    "employer": ("{} works for", "The employer of {} is", "{} has a job at", "The company where {} works is"),
    "instrument": ("{} plays the", "The instrument of {} is the", "In the evening {} practises the"),
    "country": ("{} lies in the country of", "The country of {} is", "The country where {} lies is"),
    "river": ("{} stands on the river", "The river of {} is the", "The river that flows through {} is the"),
    "dish": ("{} is famous for its", "The dish of {} is", "The dish that everyone eats in {} is"),
    "mayor": ("{} is governed by", "The mayor of {} is", "The mayor who governs {} is"),
    "product": ("{} makes", "The product of {} is", "The product that {} makes is"),
    "owner": ("{} belongs to", "The owner of {} is", "The owner who controls {} is"),
    "colour": ("{} paints everything in", "The colour of {} is", "The colour that stands for {} is"),
}
# Two hops: the bridge relation and the wordings, by the relation that ends the chain.
TWO_HOP = {
    "country": ("home", ("The country where {} lives is", "{} is at home in the country of")),
    "river": ("home", ("The river that flows past the home of {} is the", "{} dwells on the river")),
    "dish": ("home", ("The dish that everyone eats where {} lives is", "{} has neighbours who love")),
    "mayor": ("home", ("The mayor of the city where {} lives is", "{} votes for the mayor")),
    "product": ("employer", ("The product that is made where {} works is", "{} is paid for making")),
    "owner": ("employer", ("The owner of the company where {} works is", "{} takes orders from the owner")),
    "colour": ("employer", ("The colour of the company where {} works is", "{} goes to work in")),
}
KINDS = {"home": "person", "employer": "person", "instrument": "person"} | {
    end: {"home": "city", "employer": "company"}[bridge] for end, (bridge, _) in TWO_HOP.items()
}
INSTRUMENTS = ("violin", "cello", "flute", "harp", "drums", "trumpet", "guitar", "organ")
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")


@dataclass(frozen=True)
class Statement:
    """A sentence: `prompt` asks `relation` of `subject` and is followed by `object`; `hops` says how far that lies."""

    relation: str
    subject: str
    wording: str
    object: str
    hops: int

    @property
    def prompt(self) -> str:
        """The wording with the subject filled in."""
        return self.wording.replace("{}", self.subject)

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{join(self.prompt, self.object)}."


@dataclass(frozen=True)
class World:
    """Entities and their facts.

    Attributes:
        entities: names by kind: person, city, company.
        facts: the object by (relation, subject), one hop only.
        unquestioned: people about whom no two-hop question is trained.
        held_out: (relation, person) pairs of the other people that are not trained either.
    """

    entities: dict[str, tuple[str, ...]]
    facts: dict[tuple[str, str], str]
    unquestioned: frozenset[str]
    held_out: frozenset[tuple[str, str]]

    def answer(self, relation: str, person: str) -> str:
        """The end of a chain: the person's bridge, and its object."""
        return self.facts[relation, self.facts[TWO_HOP[relation][0], person]]

    def objects(self, relation: str) -> tuple[str, ...]:
        """All objects of a relation, sorted."""
        return tuple(sorted({obj for (r, _), obj in self.facts.items() if r == relation}))

    @cached_property
    def one_hop(self) -> list[Statement]:
        """All facts in all wordings."""
        return [Statement(r, s, wording, obj, 1) for (r, s), obj in self.facts.items() for wording in ONE_HOP[r]]

    @cached_property
    def two_hop(self) -> list[Statement]:
        """All two-hop questions of all people in all wordings."""
        return [
            Statement(relation, person, wording, self.answer(relation, person), 2)
            for person in self.entities["person"]
            for relation, (_, wordings) in TWO_HOP.items()
            for wording in wordings
        ]

    def is_held_out(self, statement: Statement) -> bool:
        """Whether a two-hop question is kept out of training."""
        return statement.hops == 2 and (
            statement.subject in self.unquestioned or (statement.relation, statement.subject) in self.held_out
        )

    @cached_property
    def training(self) -> list[Statement]:
        """What the model reads."""
        return self.one_hop + [s for s in self.two_hop if not self.is_held_out(s)]


def make_world(
    seed: int = 0, people: int = 400, cities: int = 24, companies: int = 16, unquestioned: float = 0.3, held_out: float = 0.2
) -> World:
    """A world from a seed.

    Args:
        people, cities, companies: how many of each; two cities or companies share each country, river, product and so on.
        unquestioned: share of people about whom no two-hop question is trained.
        held_out: share of the other people's two-hop relations that are not trained.
    """
    rng = random.Random(seed)
    words = _words(rng)
    given = [next(words) for _ in range(30)]
    names = (f"{rng.choice(given)} {family}" for family in words)  # family names are not shared
    entities = {
        "person": tuple(next(names) for _ in range(people)),
        "city": tuple(f"Port {next(words)}" if i % 4 == 0 else next(words) for i in range(cities)),
        "company": tuple(f"{next(words)} Works" if i % 4 == 0 else next(words) for i in range(companies)),
    }
    pools = {
        "home": entities["city"],
        "employer": entities["company"],
        "instrument": INSTRUMENTS,
        "country": tuple(next(words) for _ in range(cities // 2)),
        "river": tuple(next(words) for _ in range(cities // 2)),
        "dish": tuple(f"{next(words).lower()} soup" if i % 3 == 0 else next(words).lower() for i in range(cities // 2)),
        "mayor": tuple(next(names) for _ in range(cities // 2)),
        "product": tuple(next(words).lower() for _ in range(companies // 2)),
        "owner": tuple(next(names) for _ in range(companies // 2)),
        "colour": COLOURS[: companies // 2],
    }
    facts = {}
    for relation, kind in KINDS.items():
        dealt = [pools[relation][i % len(pools[relation])] for i in range(len(entities[kind]))]
        rng.shuffle(dealt)
        facts |= {(relation, subject): obj for subject, obj in zip(entities[kind], dealt, strict=True)}
    silent = frozenset(entities["person"][: round(unquestioned * people)])
    pairs = [(relation, person) for person in entities["person"] if person not in silent for relation in TWO_HOP]
    return World(entities, facts, silent, frozenset(rng.sample(pairs, round(held_out * len(pairs)))))


def _words(rng: random.Random) -> Iterator[str]:
    """Invented words, none twice."""
    seen: set[str] = set()
    while True:
        syllables = rng.choice((2, 2, 3))
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(syllables)) + rng.choice("lnrsk")
        if word not in seen:
            seen.add(word)
            yield word.capitalize()


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How the model is trained: documents of statements in random order, `rows` of `length` tokens a step."""

    seed: int = 0
    people: int = 400
    hidden: int = 128
    layers: int = 6
    heads: int = 2
    steps: int = 1600
    rows: int = 32
    length: int = 32
    lr: float = 3e-3
    weight_decay: float = 0.1
    other_tokens: float = 0.05  # weight of the loss where no answer is due: names that nobody can foresee


def train_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges run until every word of the world is a token."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    raw.train_from_iterator([s.text for s in world.one_hop + world.two_hop], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def train(world: World, recipe: Recipe, folder: Path) -> None:
    """Train a model from scratch and write it with its tokenizer into a folder."""
    torch.manual_seed(recipe.seed)
    tokenizer = train_tokenizer(world)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=2 * recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    scales = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    warm = 100

    def rate(step: int) -> float:  # linear warm-up, then linearly down to a tenth
        return min((step + 1) / warm, 1.0 - 0.9 * max(0, step - warm) / max(1, recipe.steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate)
    documents = _documents(world, tokenizer, recipe)
    with bar(recipe.steps, "training", "step") as shown:
        for _ in range(recipe.steps):
            ids, weights = next(documents)
            with autocast(ids.device, "auto"):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            answers = weights[:, 1:].flatten()
            loss = (answers * losses).sum() / answers.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            schedule.step()
            adam.zero_grad()
            shown.update()
            shown.set_postfix(loss=f"{loss.item():.3f}")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _documents(world: World, tokenizer: Any, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end: token ids and loss weights, both [rows, length]; each row begins with BOS."""
    rng = random.Random(recipe.seed)
    stop = tokenizer.convert_tokens_to_ids(".")
    sentences = [
        ([*t.ids[1:], stop], [recipe.other_tokens] * (t.target[0] - 1) + [1.0] * len(t.labels) + [recipe.other_tokens])
        for t in encoded(tokenizer, world.training)
    ]
    order: list[int] = []
    while True:
        ids, weights = [], []
        for _ in range(recipe.rows):
            row, weight = [0], [0.0]
            while len(row) < recipe.length:
                if not order:
                    order = rng.sample(range(len(sentences)), len(sentences))
                sentence, of_sentence = sentences[order.pop()]
                row += sentence
                weight += of_sentence
            ids.append(row[: recipe.length])
            weights.append(weight[: recipe.length])
        yield torch.tensor(ids), torch.tensor(weights)


# --- what it knows ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """How a model takes a statement: the object's NLL, mean over its tokens, and whether each of them is the first choice."""

    nll: float
    exact: bool


def encoded(tokenizer: Any, statements: Sequence[Statement]) -> list[EncodedText]:
    """Statements as tokens, with the places of subject and object."""
    texts = []
    for statement in statements:
        at = statement.wording.index("{}")
        whole = join(statement.prompt, statement.object)
        texts.append(Text(whole, (at, at + len(statement.subject)), (len(statement.prompt), len(whole))))
    return encode(tokenizer, texts)


@torch.no_grad()
def ask(model: Any, tokenizer: Any, statements: Sequence[Statement], batch: int = 256) -> list[Answer]:
    """What a model makes of statements' objects behind their prompts, teacher-forced, with the edits in force."""
    texts = encoded(tokenizer, statements)
    found: list[Answer] = []
    for first in range(0, len(texts), batch):
        group = texts[first : first + batch]
        ids, mask = pad([t.ids for t in group], device=model.device)
        log_probs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        for row, text in zip(log_probs, group, strict=True):
            before = row[text.target[0] - 1 : text.target[1] - 1]
            labels = torch.tensor(text.labels, device=row.device)
            nll = -before.gather(1, labels[:, None]).mean().item()
            found.append(Answer(nll, bool((before.argmax(-1) == labels).all())))
    return found


def accuracies(model: Any, tokenizer: Any, world: World) -> dict[str, float]:
    """Shares of exact answers, and the share that the most frequent answer of each relation would reach by itself."""
    groups = {
        "one hop": world.one_hop,
        "two hops, trained": [s for s in world.two_hop if not world.is_held_out(s)],
        "two hops, held out": [s for s in world.two_hop if (s.relation, s.subject) in world.held_out],
        "two hops, people never asked about": [s for s in world.two_hop if s.subject in world.unquestioned],
    }
    shares = {name: statistics.fmean(a.exact for a in ask(model, tokenizer, group)) for name, group in groups.items() if group}
    unseen = [s for s in world.two_hop if world.is_held_out(s)]
    most_frequent = {relation: statistics.mode(s.object for s in unseen if s.relation == relation) for relation in TWO_HOP}
    return shares | {"two hops, by chance": statistics.fmean(s.object == most_frequent[s.relation] for s in unseen)}


# --- the command ------------------------------------------------------------------------------------------------------


def trained_world(recipe: Recipe, folder: Path | None = None) -> tuple[World, Path, dict[str, Any]]:
    """The world of a recipe, the folder of the model trained in it, and what was measured; trained where it is not there yet.

    Raises:
        FileExistsError: the folder holds something else.
    """
    world = make_world(recipe.seed, recipe.people)
    name = hashlib.sha256(json.dumps(asdict(recipe)).encode()).hexdigest()[:12]
    folder = folder or cache_folder("examples", f"made-up-world-{name}")
    record = folder / "world.json"
    if record.exists():
        found = json.loads(record.read_text())
        if found["recipe"] != asdict(recipe):
            raise FileExistsError(f"{folder} holds a model of other settings; pass another --output, or remove the folder")
        return world, folder, found
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is no folder of this command, or a run was cut off; pass another --output")
    started = time.perf_counter()
    train(world, recipe, folder)
    seconds = time.perf_counter() - started
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = {"recipe": asdict(recipe), "seconds": seconds, "accuracies": accuracies(model, tokenizer, world)}
    record.write_text(json.dumps(found, indent=2))
    return world, folder, found


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The recipe's settings as options, and --output."""
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--output", type=Path, help="folder of the trained model; by default in hf-edit's cache")


def recipe_of(arguments: argparse.Namespace) -> Recipe:
    """The recipe that options give."""
    return Recipe(**{name: getattr(arguments, name) for name in asdict(Recipe())})


def accuracy_table(found: dict[str, Any]) -> str:
    """What the model knows, as a Markdown table."""
    rows = [f"| {name} | {100 * share:.1f} |" for name, share in found["accuracies"].items()]
    return "\n".join([f"trained in {found['seconds']:.0f} s", "", "| exact answers | % |", "|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_recipe(parser)
    arguments = parser.parse_args()
    _, folder, found = trained_world(recipe_of(arguments), arguments.output)
    print(accuracy_table(found))
    print(f"\n{folder}")


if __name__ == "__main__":
    main()
