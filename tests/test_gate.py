"""The gate: what it learns, what it is kept as, and what it switches."""

from __future__ import annotations

import pytest
import torch
from conftest import QUICK_LKS, tiny_model

from hf_edit import EditPack, Fact
from hf_edit import gate_training as training
from hf_edit.base import Base
from hf_edit.errors import PackFormatError
from hf_edit.gate import Gate, PromptEnd, asks_about_another
from hf_edit.questions import asked_relations, other_wordings, subjects

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FACTS = [
    Fact("France", "The capital of {} is", "Tokyo"),
    Fact("France", "The official language of {} is", "German"),
    Fact("Spain", "The capital of {} is", "Rome"),
]


@pytest.fixture
def base(tokenizer):
    return Base(tiny_model("llama"), tokenizer)


def test_the_wordings_that_it_learns_from_are_whole():
    relations, names = asked_relations(), subjects()
    assert len({r.name for r in relations}) == len(relations)
    for relation in relations:
        assert all(p.count("{}") == 1 for p in relation.prompts)
        assert len(relation.prompts) >= 2
        assert set(relation.kinds) <= set(names)
    assert all(len(set(own)) == len(own) >= 26 for own in names.values())


def test_it_learns_which_prompts_ask_the_same(base, quick_gate, monkeypatch):
    """On the pairs that it was trained on it does far better than an untrained projection, whose states are the same."""
    monkeypatch.setattr(training, "_STEPS", 120)
    with training.frozen(base.model):
        read = training._read(base, 3, training._bank_prompts(base, 0), False)
    untrained = Gate(read.states.mean(0), read.states.std(0), torch.eye(48), torch.tensor(0.5))
    anchors, queries, same = read.pairs()
    right = []
    for gate in (untrained, training._descended(read, 0)):
        vectors = gate.project(read.states)
        near = (vectors[anchors] * vectors[queries]).sum(-1)
        best = max(
            float((near[same] >= t).float().mean() + (near[~same] < t).float().mean()) / 2 for t in torch.linspace(-1, 1, 81)
        )
        right.append(best)
    assert right[1] > right[0] + 0.05


def test_training_is_done_once_a_model_and_gives_the_same_gate_again(base, quick_gate, monkeypatch):
    first = training.train_gate(base, 3, seed=0)

    def none(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(training, "_read", none)
    again = training.train_gate(base, 3, seed=0)
    assert all(torch.equal(t, again.tensors("")[name]) for name, t in first.tensors("").items())


def test_a_prompt_ends_with_its_content_whatever_stands_behind(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>", pad_token="<s>")
    content = tokenizer("so it is")["input_ids"]
    assert PromptEnd(tokenizer)([*content, *tokenizer(" \n")["input_ids"], 0]) == len(content) - 1
    assert PromptEnd(tokenizer)([0]) == 0
    tokenizer.chat_template = TEMPLATE
    for asks in (True, False):
        chat = [{"role": "user", "content": "We met."}, {"role": "user", "content": "so it is"}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[: PromptEnd(tokenizer)(ids) + 1]).endswith("so it is")


@pytest.mark.parametrize(
    ("before", "after", "another"),
    [
        ("The capital of France", " is", False),
        ("We like France", ". The capital of Spain is", True),
        ("We like France", ". It rained. The capital of the country is", False),
        ("We like France", " and Spain. Spain has its capital in", True),
        ("Ada Lovelace", " met Bob. Lovelace was born in", False),
        ("Who wrote Hamlet", "? The answer is", False),
        ("Q: Who wrote Hamlet", "?\nA:", False),
        ("I know Ada", ". Where do I find her?", False),
        ("我喜欢法国", "。西班牙的首都是", False),
    ],
)
def test_a_question_about_somebody_who_is_named_later_is_told_by_its_capitals(before, after, another):
    assert asks_about_another(before, after) is another


def test_a_gate_of_the_wrong_form_is_refused():
    gate = Gate(torch.zeros(4), torch.ones(4), torch.randn(4, 2), torch.tensor(0.5))
    good = gate.tensors("g.")
    assert Gate.from_tensors({}, "g.") is None
    assert torch.equal(Gate.from_tensors(good, "g.", 4).projection, gate.projection)
    for name, tensor in (
        ("std", torch.zeros(4)),
        ("mean", torch.full((4,), torch.nan)),
        ("projection", torch.randn(3, 2)),
        ("projection", torch.randn(4, 2).double()),
        ("threshold", torch.ones(2)),
    ):
        with pytest.raises(PackFormatError):
            Gate.from_tensors({**good, "g." + name: tensor}, "g.", 4)
    with pytest.raises(PackFormatError, match="threshold"):
        Gate.from_tensors({k: v for k, v in good.items() if k != "g.threshold"}, "g.")


def test_an_edit_ships_its_gate_and_facts_of_one_subject_go_one_by_one(llama, quick_gate, tmp_path):
    settings = {**QUICK_LKS, "gate": True}
    llama.edit(FACTS, "lks", progress=False, verify=False, **settings)
    pack = llama.packs["default"]
    assert pack.tensors["gate.keys"].shape == (3, 48)  # no more directions than the model has
    pack.save_pretrained(tmp_path / "pack")
    assert EditPack.from_pretrained(tmp_path / "pack") == pack
    llama.remove_edits(str(FACTS[0].id))
    left = llama.packs["default"].tensors
    assert torch.equal(left["gate.keys"], pack.tensors["gate.keys"][1:])
    assert torch.equal(left["gate.projection"], pack.tensors["gate.projection"])
    llama.edit(FACTS[0], "lks", progress=False, verify=False, **settings)  # joins again; the gate stays
    assert torch.equal(llama.packs["default"].tensors["gate.projection"], pack.tensors["gate.projection"])
    llama.rollback()
    bad = {**pack.tensors, "gate.keys": pack.tensors["gate.keys"][:2]}
    with pytest.raises(PackFormatError, match="keys"):
        llama.load_pack(EditPack(pack.method, pack.config, type(pack.fit)(bad, pack.fit.modules, pack.facts), pack.base), "x")


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("The capital of {} is", "The continent of {} is"),
        ("What was the native language of {}?", "The official language of {} is"),
    ],
)
def test_a_prompt_is_known_in_other_words_by_its_letters_or_its_content(prompt, unknown):
    found = other_wordings(Fact("Peru", prompt, "Lyon"))
    assert unknown not in found
    assert prompt not in found
    assert len(found) >= 2
    assert all(wording.count("{}") == 1 for wording in found)


def test_wordings_that_measure_a_fact_are_not_handed_out_and_doubtful_prompts_have_none():
    fact = Fact("Peru", "The capital of {} is", "Lyon")
    held_out, *others = other_wordings(fact)
    measured = Fact("Peru", "The capital of {} is", "Lyon", rephrases=(held_out.replace("{}", "Peru"),))
    assert list(other_wordings(measured)) == others
    assert other_wordings(Fact("Peru", "{} lives in", "Lyon")) == ()  # an animal's habitat or a person's home
    assert other_wordings(Fact("Peru", "{} xyzzy", "Lyon")) == ()
