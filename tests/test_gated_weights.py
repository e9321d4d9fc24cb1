"""Weight edits with a gate: each fact by itself, beside the weights, on for the prompts that ask for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import FACTS, QUICK_STEAM, same, snapshot, tiny_model

from hf_edit import ConflictingEditsError, EditableModelForCausalLM, EditPack, Fact, MergeError, PackFormatError, SteamConfig
from hf_edit.answers import target_probabilities

GATED = {**QUICK_STEAM, "gate": True, "progress": False}
SAME_SUBJECT = [FACTS[0], Fact(FACTS[0].subject, "The mayor of {} is called", "Anna"), *FACTS[1:]]


@pytest.fixture
def model(tokenizer, quick_gate):
    return EditableModelForCausalLM(tiny_model("llama"), tokenizer)


def probabilities(model, facts):
    return [math.log(p) for p in target_probabilities(model._base, facts)]


def logits(model, text):
    with torch.no_grad():
        return model(input_ids=torch.tensor([model.tokenizer(text)["input_ids"]])).logits


def test_facts_land_and_the_weights_and_all_other_text_stay_as_they_are(model):
    before, text = snapshot(model.base_model), "It was a long day, and nobody said a word about it."
    clean, aside = logits(model, text), logits(model, f"{FACTS[0].subject} and")
    report = model.edit(SAME_SUBJECT, **GATED)
    gains = [math.log(r.probability / r.probability_before) for r in report]
    assert min(gains) > 0.5, str(report)
    assert same(before, model.base_model)
    assert torch.equal(logits(model, text), clean)
    model.rollback()
    assert torch.equal(logits(model, f"{FACTS[0].subject} and"), aside)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.base_model.modules())


def test_a_fact_answers_as_if_it_were_the_only_one_however_many_there_are(model):
    alone = []
    for fact in SAME_SUBJECT:
        model.edit(fact, **GATED)
        alone += probabilities(model, [fact])
        model.rollback()
    model.edit(SAME_SUBJECT, **GATED)
    assert probabilities(model, SAME_SUBJECT) == pytest.approx(alone, abs=0.05)


def test_facts_join_and_leave_a_pack_and_the_others_stay_bit_for_bit(model):
    model.edit(SAME_SUBJECT[:2], **GATED)
    first = model.packs["default"]
    model.edit(SAME_SUBJECT[2:], **GATED)
    assert [f.id for f in model.list_edits()] == [f.id for f in SAME_SUBJECT]
    now = probabilities(model, SAME_SUBJECT[:2])
    model.remove_edits([f.id for f in SAME_SUBJECT[2:]])
    left = model.packs["default"]
    assert left.tensors.keys() == first.tensors.keys()
    assert all(torch.equal(t, first.tensors[name]) for name, t in left.tensors.items())
    assert probabilities(model, SAME_SUBJECT[:2]) == pytest.approx(now, abs=1e-5)


def test_a_pack_brings_its_gate_and_answers_the_same_when_loaded(model, tokenizer, tmp_path):
    model.edit(SAME_SUBJECT, **GATED)
    expected = probabilities(model, SAME_SUBJECT)
    model.save_pretrained(tmp_path / "pack")
    other = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    other.load_pack(tmp_path / "pack")
    assert probabilities(other, SAME_SUBJECT) == pytest.approx(expected, abs=1e-5)


def test_what_the_prompt_decides_can_not_become_part_of_the_weights(model, tmp_path):
    model.edit(FACTS[:1], **GATED)
    with pytest.raises(MergeError, match="without a gate"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="without a gate"):
        model.packs["default"].export_peft(tmp_path / "lora")


def test_packs_of_one_gate_add_up_to_that_of_all_facts_and_others_are_refused(model):
    model.edit(SAME_SUBJECT[:2], **GATED)
    model.edit(SAME_SUBJECT[2:], **GATED, pack_name="more")
    assert [f.id for f in model.list_edits()] == [f.id for f in SAME_SUBJECT]
    one, other = model.packs["default"], model.packs["more"]
    expected = probabilities(model, SAME_SUBJECT)
    both = one + other
    model.rollback()
    model.load_pack(both)
    assert probabilities(model, SAME_SUBJECT) == pytest.approx(expected, abs=1e-4)
    moved = {**other.tensors, "gate.threshold": other.tensors["gate.threshold"] + 0.1}
    with pytest.raises(MergeError, match="pack_name"):
        _ = one + replace(other, fit=replace(other.fit, tensors=moved))


def test_facts_of_one_pack_all_have_the_gate_or_none(model):
    model.edit(FACTS[:1], **GATED)
    with pytest.raises(ConflictingEditsError, match="gate=True"):
        model.edit(FACTS[1:], **{**GATED, "gate": False})


@pytest.mark.parametrize(("method", "settings"), [("steam", {"base_editor": "memit"}), ("memit", {})])
def test_an_editor_that_solves_all_facts_together_takes_no_gate(model, method, settings):
    with pytest.raises(ValueError, match="by itself"):
        model.edit(FACTS, method, **GATED, **settings)


def test_a_pack_whose_settings_and_tensors_disagree_about_the_gate_is_refused(model):
    model.edit(FACTS, **GATED)
    pack = model.packs["default"]
    method, fit = model_method(pack)
    with pytest.raises(PackFormatError, match="gate=False and has one"):
        method.validate(fit, SteamConfig(), None)
    bare = type(fit)({n: t for n, t in fit.tensors.items() if not n.startswith("gate.")}, fit.modules, fit.facts)
    with pytest.raises(PackFormatError, match="gate=True and has none"):
        method.validate(bare, SteamConfig(gate=True), None)
    empty = type(fit)({n: t for n, t in fit.tensors.items() if n.startswith("gate.")}, (), fit.facts)
    with pytest.raises(PackFormatError, match="nothing behind it"):
        method.validate(empty, SteamConfig(gate=True), None)
    for block in (6.0, 0.5, -1.0, float("nan")):
        beyond = type(fit)({**fit.tensors, "gate.block": torch.tensor([block])}, fit.modules, fit.facts)
        with pytest.raises(PackFormatError, match="no block"):
            method.validate(beyond, SteamConfig(gate=True), model._base)
    broken = type(fit)({**fit.tensors, "gate.keys": fit.tensors["gate.keys"][:1]}, fit.modules, fit.facts)
    with pytest.raises(PackFormatError, match="keys"):
        method.validate(broken, SteamConfig(gate=True), None)


def model_method(pack: EditPack):
    """The pack's method and what it fitted."""
    from hf_edit.methods import get_method

    return get_method(pack.method), pack.fit
