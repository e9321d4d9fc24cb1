"""The gate: what it learns, what it is kept as, and what it switches."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from conftest import QUICK_LKS, TEMPLATE, tiny_model
from safetensors.torch import load_file, save_file

from hf_edit import EditPack, Fact, Question
from hf_edit import gate_training as training
from hf_edit.base import Base
from hf_edit.cache import cache_folder
from hf_edit.errors import PackFormatError
from hf_edit.gate import Gate, LearnedGate, PromptEnd, asks_about_another, gate_block
from hf_edit.questions import asked_relations, other_wordings, subjects
from hf_edit.wording import Words, agreement, asked_words

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
        read = training._read(base, 3, training.bank_prompts(base, 0), False)
    states, embeddings = read.states, read.embeddings
    untrained = Gate(
        mean=states.mean(0),
        std=states.std(0),
        projection=torch.eye(48),
        word_projection=torch.eye(48),
        word_offset=-embeddings.mean(0),
        word_weight=torch.zeros(48),
        word_bias=torch.zeros(1),
        head=torch.ones(4),
        threshold=torch.zeros(1),
    )
    anchors, queries, same = read.pairs()
    right = []
    for gate in (untrained, training._descended(read, [range(12), ()], training._Wordings(base), (), 0)):
        near = training._scores(gate, read, anchors, queries)
        steps = torch.linspace(float(near.min()), float(near.max()), 81)
        right.append(max(float((near[same] >= t).float().mean() + (near[~same] < t).float().mean()) / 2 for t in steps))
    assert right[1] > right[0] + 0.05


def test_training_is_done_once_a_model_and_gives_the_same_gate_again(base, quick_gate, monkeypatch):
    first = training.train_gate(base, 3, seed=0)

    def none(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(training, "_read", none)
    again = training.train_gate(base, 3, seed=0)
    assert all(torch.equal(t, again.tensors("")[name]) for name, t in first.tensors("").items())


def test_a_quieter_gate_has_a_higher_threshold_and_is_the_same_otherwise(base, quick_gate, monkeypatch):
    gates = [training.train_gate(base, 3).at(share).tensors("") for share in (0.6, 0.97)]
    assert float(gates[0].pop("threshold")) < float(gates[1].pop("threshold"))
    assert all(torch.equal(t, gates[1][name]) for name, t in gates[0].items())


def test_a_damaged_gate_in_the_cache_is_trained_anew(base, quick_gate, monkeypatch):
    read, times = training._read, []
    monkeypatch.setattr(training, "_read", lambda *args: times.append(1) or read(*args))
    training.train_gate(base, 3)
    (path,) = cache_folder("gates", base.fingerprint).glob("*.safetensors")
    for damage in ({"gate.mean": torch.zeros(2)}, {**load_file(path), "gate.others": torch.zeros(0)}):
        times.clear()
        save_file(damage, path)
        made = training.train_gate(base, 3).tensors("")
        kept = training.train_gate(base, 3).tensors("")
        assert len(times) == 1  # and what is in the cache then is whole
        assert all(torch.equal(t, kept[name]) for name, t in made.items())


def test_a_gate_that_learned_from_other_prompts_is_not_taken_from_the_cache(base, quick_gate, monkeypatch):
    training.train_gate(base, 3)

    def again(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(training, "_read", again)
    training.train_gate(base, 3)
    chatty = copy.deepcopy(base.tokenizer)
    chatty.chat_template = TEMPLATE
    with pytest.raises(AssertionError, match="read again"):
        training.train_gate(Base(base.model, chatty), 3)
    monkeypatch.setattr("hf_edit.gate_prompts._SENTENCES", ("It is late. ",))
    with pytest.raises(AssertionError, match="read again"):
        training.train_gate(base, 3)


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
    gate = Gate(
        mean=torch.zeros(4),
        std=torch.ones(4),
        projection=torch.randn(4, 2),
        word_projection=torch.randn(6, 3),
        word_offset=torch.zeros(3),
        word_weight=torch.zeros(6),
        word_bias=torch.zeros(1),
        head=torch.ones(4),
        threshold=torch.tensor([0.5]),
    )
    good = gate.tensors("g.")
    assert Gate.from_tensors({}, "g.") is None
    assert torch.equal(Gate.from_tensors(good, "g.", 4).projection, gate.projection)
    for name, tensor in (
        ("std", torch.zeros(4)),
        ("mean", torch.full((4,), torch.nan)),
        ("projection", torch.randn(3, 2)),
        ("projection", torch.randn(4, 2).double()),
        ("threshold", torch.ones(2)),
        ("threshold", torch.tensor(0.5)),
        ("word_projection", torch.randn(5, 3)),
        ("word_offset", torch.zeros(2)),
        ("head", torch.ones(3)),
        ("word_weight", torch.full((6,), torch.inf)),
    ):
        with pytest.raises(PackFormatError):
            Gate.from_tensors({**good, "g." + name: tensor}, "g.", 4, 6)
    with pytest.raises(PackFormatError, match="word_projection"):
        Gate.from_tensors(good, "g.", 4, 7)
    with pytest.raises(PackFormatError, match="threshold"):
        Gate.from_tensors({k: v for k, v in good.items() if k != "g.threshold"}, "g.")


def _telling(count):
    """Facts with wordings of their own."""
    return [
        Fact(f"Nowhere {n}", "The capital of {} is", "Rome", rephrases=("{}'s seat of government is",),
             locality=(Question(f"The king of Nowhere {n} is called"),))
        for n in range(count)
    ]  # fmt: skip


def test_it_learns_from_facts_that_have_a_rephrase_and_a_question_where_they_are_enough(base, quick_gate, monkeypatch):
    monkeypatch.setattr(training, "_FEWEST", 6)
    alone = training.train_gate(base, 3)
    useless = [replace(f, rephrases=()) for f in _telling(6)] + [replace(f, locality=()) for f in _telling(6)]
    for facts in (_telling(5), useless):
        assert torch.equal(training.train_gate(base, 3, facts).gate.projection, alone.gate.projection)
    told = training.train_gate(base, 3, _telling(6))
    assert not torch.equal(told.gate.projection, alone.gate.projection)

    def none(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(training, "_read", none)
    assert torch.equal(training.train_gate(base, 3, _telling(6)).others, told.others)
    with pytest.raises(AssertionError, match="read again"):
        training.train_gate(base, 3, _telling(7))


def test_an_edit_learns_its_gate_from_rephrases_only_where_it_may(llama, quick_gate, monkeypatch):
    monkeypatch.setattr(training, "_FEWEST", 6)
    made = []
    for settings in ({}, {"train_on_rephrases": True}):
        llama.edit(_telling(6), "lks", progress=False, verify=False, **{**QUICK_LKS, "gate": True, "min_steps": 1, **settings})
        made.append(llama.packs["default"].tensors["gate.projection"])
        llama.rollback()
    alone = training.train_gate(llama._base, int(gate_block(llama._base.layout(), 2))).gate.projection
    assert torch.equal(made[0], alone)
    assert not torch.equal(made[1], alone)


def test_a_learned_gate_that_is_kept_is_checked_when_it_is_read(base, quick_gate):
    tensors = training.train_gate(base, 3).tensors("g.")
    again = LearnedGate.from_tensors(tensors, "g.", 48, 48)
    assert torch.equal(again.others, tensors["g.others"])
    assert again.block == 3
    assert LearnedGate.from_tensors({}, "g.") is None
    for name, tensor, message in (
        ("others", tensors["g.others"].flip(0), "rising"),
        ("others", torch.zeros(1), "rising"),
        ("others", torch.full((9,), torch.nan), "rising"),
        ("others", torch.arange(9), "rising"),
        ("block", torch.tensor([0.5]), "no block"),
        ("block", torch.tensor([-1.0]), "no block"),
        ("block", torch.tensor([1]), "no block"),
        ("extra", torch.zeros(1), "more than"),
        ("head", torch.zeros(3), "head"),
    ):
        with pytest.raises(PackFormatError, match=message):
            LearnedGate.from_tensors({**tensors, "g." + name: tensor}, "g.")
    with pytest.raises(PackFormatError, match="incomplete"):
        LearnedGate.from_tensors({n: t for n, t in tensors.items() if n != "g.others"}, "g.")


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
    ("text", "name", "asked"),
    [
        ("The capital of France is", "France", "The capital of is"),
        ("It rained. Where was Ada born?", "Ada", "Where was born?"),
        ("I met Ada. Where was she born?", "Ada", "I met . Where was she born?"),
        ("I met Ada. It rained. Where was she born?", "Ada", "Where was she born?"),
        ("What is the twin city of St. Olav? It is", "St. Olav", "What is the twin city of ? It is"),
        ("What language is spoken there?", "Ada", "What language is spoken there?"),
        ("", "Ada", ""),
    ],
)
def test_a_question_is_known_by_the_words_of_its_sentence_without_the_name(text, name, asked):
    assert asked_words(text, [m.span() for m in re.finditer(re.escape(name), text)]) == asked
    assert asked_words(text.replace(name, "{}")) == asked


def test_words_agree_fully_with_themselves_and_as_much_as_their_weights_say_with_others():
    vectors = torch.eye(3)[None]
    one, other = Words(vectors, torch.tensor([[1.0, 3.0, 0.0]])), Words(vectors, torch.tensor([[0.0, 1.0, 1.0]]))
    assert [float(a) for a in agreement(one, one)] == [1.0, 1.0]
    assert [float(a) for a in agreement(one, other)] == [0.75, 0.5]
    nothing = Words(vectors, torch.zeros(1, 3))
    assert [float(a) for a in agreement(one, nothing)] == [-1.0, 0.0]


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
