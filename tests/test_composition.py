"""Several packs on one model, packs as sums and differences, and single facts taken out again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import FACTS, same, snapshot, tiny_model
from hostile import QUICKEST, rehash

from hf_edit import BaseMismatchError, ConflictingEditsError, EditableModelForCausalLM, EditPack, Fact, MergeError
from hf_edit.facts import resolve_conflicts, superseded
from hf_edit.methods import Fit, get_method
from hf_edit.methods.steam.record import Record
from hf_edit.weights.solve import insert

OTHERS = [fact.replace(subject=f"New {fact.subject}") for fact in FACTS]


@pytest.fixture
def model(world):
    """A clean model of one's own."""
    return EditableModelForCausalLM(tiny_model("llama"), world.model.tokenizer)


def _edit(model, facts, method="steam", **kwargs):
    return model.edit(facts, method, progress=False, verify=False, **QUICKEST[method], **kwargs)


def _logits(model, text=FACTS[0].question):
    with torch.no_grad():
        return model(**model.tokenizer(text, return_tensors="pt")).logits


def _contradicting(pack, **changes):
    """The pack with another answer to its first question."""
    first, *rest = pack.facts
    fit = type(pack.fit)(pack.tensors, pack.fit.modules, (first.replace(target="Kyoto", **changes), *rest))
    return EditPack(pack.method, pack.config, fit, pack.base)


# --- conflicts --------------------------------------------------------------------------------------------------------


def test_a_contradiction_in_other_words_is_one_too():
    old = Fact("France", "The capital of {} is", "Paris", rephrases=("{}'s seat of government is",))
    new = Fact("france", "{}'s seat of  Government is", "Lyon")
    other = Fact("Spain", "{}'s seat of government is", "Lyon")
    with pytest.raises(ConflictingEditsError, match="two targets"):
        resolve_conflicts([new], [old])
    assert resolve_conflicts([new], [old], "replace") == [new]
    assert resolve_conflicts([new], [old], "keep") == []
    assert superseded([old], [new]) == [old]
    assert resolve_conflicts([other], [old]) == [other]
    same_answer = new.replace(target="Paris")
    assert resolve_conflicts([same_answer], [old]) == [same_answer]  # another wording of it, nothing to settle
    assert superseded([old], [same_answer]) == []


def test_a_contradicting_pack_is_refused_before_anything_changes(world, model):
    model.load_pack(world.folder / "steam")
    before, pack = snapshot(model.base_model), model.packs["default"]
    with pytest.raises(ConflictingEditsError, match="two targets"):
        model.load_pack(_contradicting(pack), "other")
    assert same(before, model.base_model)
    assert model.packs == {"default": pack}


def test_a_contradicting_pack_replaces_what_it_contradicts(world, model):
    model.load_pack(world.folder / "lks")
    new = _contradicting(EditPack.from_pretrained(world.folder / "steam"))
    new = new.remove([str(fact.id) for fact in new.facts[2:]])
    model.load_pack(new, "new", on_conflict="replace")
    assert model.active_packs == ["default", "new"]
    assert [fact.target for fact in model.list_edits()] == ["Berlin", "Madrid", "Kyoto", "Rome"]
    model.rollback()
    assert same(world.clean, model.base_model)


def test_a_contradicting_pack_keeps_what_there_is(world, model):
    model.load_pack(EditPack.from_pretrained(world.folder / "steam").remove([str(FACTS[3].id)]))
    new = _contradicting(EditPack.from_pretrained(world.folder / "steam"))
    model.load_pack(new, "new", on_conflict="keep")
    assert [fact.target for fact in model.packs["new"].facts] == [FACTS[3].target]
    assert model.list_edits() == FACTS
    with pytest.raises(ConflictingEditsError, match="nothing of it is left"):
        model.load_pack(new, "again", on_conflict="keep")
    with pytest.raises(ValueError, match="on_conflict is"):
        model.load_pack(new, "again", on_conflict="merge")


def test_an_edit_that_replaces_takes_the_old_fact_out_of_whatever_pack_it_is_in(world, model):
    model.load_pack(world.folder / "lks", "people")
    _edit(model, FACTS[1].replace(target="Lisbon"), on_conflict="replace")
    assert model.active_packs == ["people", "default"]
    assert [fact.target for fact in model.list_edits()] == ["Tokyo", "Berlin", "Madrid", "Lisbon"]
    model.rollback()
    assert same(world.clean, model.base_model)


# --- sums and differences ---------------------------------------------------------------------------------------------


def test_the_sum_of_two_packs_is_both_on_one_model(world, model, tmp_path):
    one = EditPack.from_pretrained(world.folder / "steam")
    _edit(model, OTHERS[0], "steam", base_editor="rome")  # in one layer, the last
    other = model.packs["default"]
    model.rollback()
    both = one + other
    assert both.facts == (*one.facts, *other.facts)
    model.load_pack(one, "one")
    model.load_pack(other, "other")
    expected = _logits(model)
    model.rollback()
    both.save_pretrained(tmp_path / "both")
    model.load_pack(tmp_path / "both")
    torch.testing.assert_close(_logits(model), expected, atol=1e-5, rtol=1e-5)
    assert both.remove([str(OTHERS[0].id)]).facts == one.facts


def test_what_can_not_be_added_up_says_so(world):
    steam, lks = (EditPack.from_pretrained(world.folder / method) for method in ("steam", "lks"))
    for one, other in ((steam, lks), (lks, lks)):
        with pytest.raises(MergeError, match="put both on the model"):
            _ = one + other
    with pytest.raises(ConflictingEditsError, match="share facts"):
        _ = steam + steam
    with pytest.raises(ConflictingEditsError, match="two targets"):
        _ = steam + _contradicting(steam)
    elsewhere = EditPack("steam", steam.config, steam.fit, {**steam.base, "tokenizer_fingerprint": "0" * 32})
    with pytest.raises(BaseMismatchError, match="different bases"):
        _ = steam + elsewhere
    with pytest.raises(TypeError):
        _ = steam + 1


def test_a_difference_says_what_changed(world):
    pack = EditPack.from_pretrained(world.folder / "steam")
    assert not pack.diff(pack)
    assert str(pack.diff(pack)) == "no difference"
    less = pack.remove([str(FACTS[2].id)])
    assert pack.diff(less).removed == (FACTS[2],)
    assert less.diff(pack).added == (FACTS[2],)
    other = _contradicting(pack)
    assert pack.diff(other).changed == ((FACTS[0], other.facts[0]),)
    assert "Tokyo -> Kyoto" in str(pack.diff(other))
    assert pack.diff(EditPack.from_pretrained(world.folder / "lks")).settings["method"] == ("steam", "lks")
    doubled = {name: tensor * 2 for name, tensor in pack.tensors.items()}
    again = EditPack("steam", pack.config, type(pack.fit)(doubled, pack.fit.modules, pack.facts), pack.base)
    assert pack.diff(again).tensors


def test_a_layer_without_a_fact_is_what_the_others_alone_give():
    generator = torch.Generator().manual_seed(0)
    keys, residuals, root = (torch.randn(96, n, generator=generator, dtype=torch.float64) for n in (4, 4, 96))
    whitened = torch.linalg.solve(root @ root.T + torch.eye(96), keys)
    kept = [0, 1, 3]
    whole, alone = (insert(keys[:, own], whitened[:, own], residuals[:, own]) for own in (range(4), kept))
    tensors = {"m.left": whole.factors.left, "m.right": whole.factors.right, "m.gram": whole.gram}
    tensors |= Record.of(torch.randn(4, 1, 96), 0, "memit").tensors()
    method = get_method("steam")
    removed = method.remove(Fit(tensors, ("m",), tuple(FACTS)), kept)
    assert removed.facts == tuple(FACTS[i] for i in kept)
    found = method.factors(removed)["m"].dense()
    assert (found - whole.factors.dense()).abs().max() > 1e-2
    torch.testing.assert_close(found, alone.factors.dense(), atol=1e-5, rtol=1e-5)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacked(world, tmp_path_factory):
    """A folder of two packs, "above" made on top of "below"."""
    folder = tmp_path_factory.mktemp("stacked")
    model = EditableModelForCausalLM(tiny_model("llama"), world.model.tokenizer)
    model.load_pack(world.folder / "steam", "zzz_below")
    _edit(model, OTHERS[:2], pack_name="above")
    model.save_pretrained(folder / "packs")
    return folder / "packs"


def test_packs_made_on_top_of_each_other_come_back_in_their_order(world, stacked, model):
    again = EditableModelForCausalLM.from_pretrained(stacked, base_model=world.folder / "base")
    assert again.active_packs == ["zzz_below", "above"]
    assert again.packs["above"].parent == again.packs["zzz_below"].digest
    assert again.packs["zzz_below"].parent is None


def test_a_parent_that_is_absent(stacked, model, caplog):
    clean = snapshot(model.base_model)
    with pytest.raises(BaseMismatchError, match="made on top of other edits"):
        model.load_pack(stacked / "above")
    assert same(clean, model.base_model)
    assert model.packs == {}
    model.load_pack(stacked / "above", verify_base="warn")
    assert "made on top of other edits" in caplog.text
    assert model.active_packs == ["default"]


def test_parents_in_a_circle(world, stacked, tmp_path):
    """A digest covers the parent's, so nobody can make a true circle; packs that claim one are refused, in no time."""
    folder = tmp_path / "packs"
    shutil.copytree(stacked, folder)
    for _ in range(3):
        for name, other in (("above", "zzz_below"), ("zzz_below", "above")):
            digest = EditPack.from_pretrained(folder / other).digest
            rehash(folder / name, lambda config, digest=digest: config.update(parent=digest))
    with pytest.raises(BaseMismatchError, match="made on top of other edits"):
        EditableModelForCausalLM.from_pretrained(folder, base_model=world.folder / "base")


def test_what_lies_beneath_may_change_and_still_be_saved_and_loaded(world, stacked, tmp_path):
    model = EditableModelForCausalLM.from_pretrained(stacked, base_model=world.folder / "base")
    model.remove_edits(str(FACTS[0].id))
    assert model.packs["above"].parent == model.packs["zzz_below"].digest
    model.save_pretrained(tmp_path / "packs")
    again = EditableModelForCausalLM.from_pretrained(tmp_path / "packs", base_model=world.folder / "base")
    assert again.list_edits() == model.list_edits()
    torch.testing.assert_close(_logits(again), _logits(model), atol=1e-6, rtol=1e-6)
    model.delete_pack("zzz_below")
    assert model.packs["above"].parent is None
    assert json.loads((tmp_path / "packs" / "above" / "edit_config.json").read_text())["parent"]
