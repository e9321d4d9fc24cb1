"""A fact's own prompt activates it, in every form and whatever the gate has learned."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPLATE, tiny_model

from hf_edit import Fact
from hf_edit.base import Base
from hf_edit.gate import Gate, embedding_size
from hf_edit.lm.chat import chat_frame, chat_text
from hf_edit.methods.scope.attachment import MentionAttachment
from hf_edit.own_prompts import OwnPrompts, user_says
from hf_edit.routing import GATE, fit_routing, load_routing
from hf_edit.scope import Entities
from hf_edit.weights.attach import ActingAlone

FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),
    Fact("France", "The official language of {} is", "German"),
    Fact("France", "We all know that the capital of {} is", "Rome"),  # ends in the first one's prompt
    Fact("France", "What do Germany and {} share?\n", "nothing"),
    Fact("France", "Where is {}, next to Spain? France lies, as Italy and Spain do, in", "Asia"),
    Fact("It", "Who wrote {}?", "Ann"),  # a common word
    Fact("York", "New {} is a city in", "Peru"),  # within a longer name ...
    Fact("New York", "The mayor of {} is", "Bob"),
    Fact("New York City", "{} was founded in", "1999"),
    Fact("Deutschland", "{}s Hauptstadt ist", "Bonn"),  # within a word
    Fact("first two races", "who won the {} of the triple crown", "Ann"),
    Fact("first two races of the triple crown", "when were the {}", "1999"),
]
OTHERS = ["The continent of France is", "The mayor of New York City is", "Nobody is here"]


@pytest.fixture
def base(tokenizer):
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>", pad_token="<s>")
    own.chat_template = TEMPLATE
    return Base(tiny_model("llama"), own)


def deaf(base: Base) -> Gate:
    """A gate that no score passes."""
    size, embedding = base.layout().hidden_size, embedding_size(base)
    return Gate(
        mean=torch.zeros(size),
        std=torch.ones(size),
        projection=torch.eye(size),
        word_projection=torch.eye(embedding),
        word_offset=torch.zeros(embedding),
        word_weight=torch.zeros(embedding),
        word_bias=torch.zeros(1),
        head=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        threshold=torch.tensor([1e6]),
    )


def attached(base: Base, facts: list[Fact]) -> tuple[MentionAttachment, list[set[int]]]:
    """A gated edit of weights in a low block, and the facts that its last run had active."""
    learned = SimpleNamespace(at=lambda _: deaf(base), block=2)
    tensors = fit_routing(base, facts, {}, None, 0, False, 0.95, learned=learned)
    assert GATE + "keys" in tensors
    active: list[set[int]] = [set()]
    module = base.model.get_submodule(base.layout().projection(1))
    acting = ActingAlone(torch.randn(base.layout().hidden_size, len(facts)))

    def effect(given, output, points):
        active[0] = set(points.facts)
        return acting(given, output, points)

    return MentionAttachment(base, Entities.of(facts), {module: effect}, load_routing(base, tensors, facts)), active


def chosen(base: Base, active: list[set[int]], text: str, special: bool = True) -> set[int]:
    active[0] = set()
    with torch.no_grad():
        base.model(input_ids=torch.tensor([base.tokenizer(text, add_special_tokens=special)["input_ids"]]))
    return active[0]


def forms(base: Base, question: str) -> list[tuple[str, bool]]:
    """A prompt as plain text and in the chat."""
    user = {"role": "user", "content": question}
    system = {"role": "system", "content": "Answer in one word."}
    chats = [chat_text(base.tokenizer, messages).text for messages in ([user], [system, user])]
    plain = [question, question + " ", question + "\n\n", "It rained. " + question]
    return [*((text, True) for text in plain), *((text, False) for text in chats)]


def test_a_facts_own_prompt_activates_it_whatever_the_threshold(base):
    edit, active = attached(base, FACTS)
    for number, fact in enumerate(FACTS):
        for text, special in forms(base, fact.question):
            assert chosen(base, active, text, special) == {number}, text
    for text in OTHERS:
        assert chosen(base, active, text) == set(), text
    edit.detach()


def test_a_subject_is_recognised_by_its_other_names(base):
    edit, active = attached(base, [Fact("France", "The capital of {} is", "Rome", aliases=("Germany",))])
    assert chosen(base, active, "The capital of Germany is") == {0}
    edit.detach()


def test_facts_with_the_same_prompt_about_two_subjects_are_both_active(base):
    edit, active = attached(base, [Fact("France", "{} and Spain are", "old"), Fact("Spain", "France and {} are", "new")])
    assert chosen(base, active, "France and Spain are") == {0, 1}
    edit.detach()


def test_a_fact_whose_prompt_is_a_rendered_chat_is_recognised_by_what_the_user_says(base):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The capital of {} is"}]
    told = Fact("France", chat_text(base.tokenizer, messages).text, "Rome")
    edit, active = attached(base, [FACTS[1], told])
    for text, special in [*forms(base, "The capital of France is"), (told.question, False)]:
        assert chosen(base, active, text, special) == {1}, text
    edit.detach()


def test_a_chat_that_names_the_subject_in_an_earlier_turn_is_recognised_as_a_whole(base):
    frame = chat_frame(base.tokenizer)
    assert frame is not None
    turns = [("user", "I like {}."), ("assistant", "So do I."), ("user", "The capital of it is")]
    text = chat_text(base.tokenizer, [{"role": role, "content": content} for role, content in turns]).text
    assert user_says(text, frame).startswith("<s>user\nI like {}.")
    own = OwnPrompts([Fact("France", text, "Rome")], frame)
    said = text.replace("{}", "France").rpartition("<s>\n<s>assistant")[0]
    assert own.asked_by(said, [0]) == [0]
    assert own.asked_by("The capital of it is", [0]) == []


def test_only_the_end_of_a_text_counts_and_words_are_whole():
    own = OwnPrompts(FACTS[:3], None)
    assert own.asked_by("The capital of France is Paris, and", [0, 1]) == []
    assert own.asked_by("Bathe capital of France is", [0]) == []
    assert own.asked_by("In truth,  THE capital of France is", [0, 2]) == [0]
    assert own.asked_by("We all know that the capital of France is", [0, 2]) == [2]
    assert own.asked_by('Fill in what is missing: "The capital of France is ..."', [0, 2]) == [0]


@pytest.mark.parametrize(
    ("after", "asked"),
    [
        (" Thanks!", True),
        (" Answer in one word. No more than that, please.", True),
        ('" Answer briefly.', True),
        (" She lives in", False),
        (" Oslo. Where was she born?", False),
        (" Oslo.\nHer job:", False),
        ("<s>\n<s>assistant\nOslo.<s>\n<s>user\nThanks!", False),
        (" A: Oslo. Thanks.", False),
        (" " + "It is so. " * 20, False),
    ],
)
def test_a_short_remark_may_follow_a_question(after, asked):
    own = OwnPrompts([Fact("Ann", "Where does {} live?", "Oslo"), Fact("Ann", "{} was born in", "Rome")], None)
    assert own.asked_by("Where does Ann live?" + after, [0, 1]) == [0] * asked
    assert own.asked_by("Where does Ann live? Thanks!", [0], remark=False) == []
