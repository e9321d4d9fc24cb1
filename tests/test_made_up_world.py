"""The made-up world of the benchmarks: what is held out stays out, and every two-hop answer follows from one-hop facts."""

from __future__ import annotations

import importlib.util
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parent.parent / "examples" / "benchmarks" / "made_up_world.py"


@pytest.fixture(scope="module")
def made_up() -> ModuleType:
    spec = importlib.util.spec_from_file_location("made_up_world", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["made_up_world"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(made_up: ModuleType) -> object:
    return made_up.make_world(seed=3, people=60)


def test_a_seed_makes_one_world(made_up: ModuleType, world: object) -> None:
    assert made_up.make_world(seed=3, people=60) == world
    assert made_up.make_world(seed=4, people=60) != world


def test_no_held_out_question_is_in_the_training_text(made_up: ModuleType, world: object) -> None:
    text = " ".join(s.text for s in world.training)
    held_out = [s for s in world.two_hop if world.is_held_out(s)]
    assert {s.subject for s in held_out} > world.unquestioned
    assert {(s.relation, s.subject) for s in held_out} > world.held_out
    assert not [s for s in held_out if s.prompt in text]
    assert len(held_out) + len(world.training) == len(world.one_hop) + len(world.two_hop)


def test_two_hop_answers_follow_from_one_hop_statements_in_the_training_text(made_up: ModuleType, world: object) -> None:
    said = {(s.relation, s.subject): s.object for s in world.training if s.hops == 1}
    for statement in world.two_hop:
        bridge, _ = made_up.TWO_HOP[statement.relation]
        assert said[statement.relation, said[bridge, statement.subject]] == statement.object


def test_a_prompt_has_one_answer(world: object) -> None:
    """No prompt asks for two objects, and none is the beginning of another, whose next word would be as right."""
    statements = world.one_hop + world.two_hop
    assert len({s.prompt for s in statements}) == len(statements)
    prompts = sorted(s.prompt + " " for s in statements)
    assert not [(a, b) for a, b in pairwise(prompts) if b.startswith(a)]


def test_the_tokenizer_has_a_token_for_every_word(made_up: ModuleType, world: object) -> None:
    tokenizer = made_up.train_tokenizer(world)
    for statement in (*world.one_hop[::7], *world.two_hop[::7]):
        (encoded,) = made_up.encoded(tokenizer, [statement])
        assert len(encoded.ids) == 1 + len(statement.prompt.split()) + len(statement.object.split())
        assert tokenizer.decode(encoded.labels).strip() == statement.object
        assert tokenizer.decode(encoded.ids[encoded.subject]).strip() == statement.subject.split()[-1]
