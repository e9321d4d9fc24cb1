"""Facts taken out of a weight edit through the model: what is left is what the others' values make by themselves."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from conftest import FACTS, POST_NORM, QUICK_STEAM, interrupted, same, snapshot, tiny_model

import hf_edit
from hf_edit import EditableModelForCausalLM, EditPack, Fact
from hf_edit.methods import get_method
from hf_edit.methods.steam import job
from hf_edit.weights.values import Values

MORE = [Fact(f"New {fact.subject}", "The capital of {} is", fact.target) for fact in FACTS]
OTHER_WORDING = Fact(FACTS[0].subject, "The mayor of {} is called", "Rome")
SETTINGS = {
    **QUICK_STEAM,
    "layers": [1, 2, 3],
    "contexts": 3,
    "context_length": 4,
    "retries": 0,
    "progress": False,
    "verify": False,
}


@pytest.fixture
def given_values(monkeypatch):
    """Each fact's value goes by its own text alone. Optimised ones differ in the last digits with who runs beside a fact, and
    Adam makes more of that."""

    def values(base, texts, settings, **_):
        states = torch.empty(len(texts), base.model.config.hidden_size)
        for row, text in zip(states, (text.rewrites[0] for text in texts), strict=True):
            own = sum(text.ids[: text.target[1]])  # without the tail, which is what the model says
            row.normal_(generator=torch.Generator().manual_seed(own + settings.block))
        return Values(states, states, torch.empty(0, len(texts)), None)

    monkeypatch.setattr(job, "optimize_values", values)


@pytest.fixture
def make(tokenizer):
    """Tiny models, of which two of a name are equal."""
    return lambda name="llama": EditableModelForCausalLM(tiny_model(name), tokenizer)


def _ids(*facts):
    return [str(fact.id) for fact in facts]


def _change(model, name="default"):
    pack = model.packs[name]
    return {module: change.dense() for module, change in get_method(pack.method).factors(pack.fit).items()}


def _difference(model, other):
    """Of two models' edits, relative to the other's: of the layer where it is largest."""
    found, expected = _change(model), _change(other)
    assert found.keys() == expected.keys()
    return max(float((found[m] - expected[m]).norm() / expected[m].norm()) for m in expected)


def _solved(model, *facts):
    """What is left when facts are solved out of the pack, without the model."""
    other = EditableModelForCausalLM(tiny_model("llama"), model.tokenizer)
    other.load_pack(model.packs["default"].remove(_ids(*facts)), verify_base="off")
    return other


@pytest.mark.usefixtures("given_values")
@pytest.mark.parametrize("out", [(1,), (0, 2)], ids=["one", "several"])
def test_what_is_left_is_an_edit_of_the_others(make, architecture, out):
    left = [fact for i, fact in enumerate(FACTS) if i not in out]
    model, other = make(architecture), make(architecture)
    model.edit(FACTS, **SETTINGS)
    model.remove_edits(_ids(*(FACTS[i] for i in out)), progress=False)
    other.edit(left, **SETTINGS, base_editor="memit")
    assert model.list_edits() == left
    assert _difference(model, other) < 1e-5
    assert len(model.packs["default"].fit.modules) > 1
    edits = model.packs["default"].tensors["values"].shape[1]
    assert (edits > 1) == (architecture in POST_NORM)  # a value a layer there


@pytest.mark.usefixtures("given_values")
@pytest.mark.parametrize("editor", ["rome", "r_rome", "memit", "alphaedit"])
def test_so_it_is_with_every_base_editor(make, editor):
    model, other = make(), make()
    model.edit([*FACTS, OTHER_WORDING], **SETTINGS, base_editor=editor, null_space_threshold=0.5)
    model.remove_edits(_ids(FACTS[0], FACTS[2]))
    other.edit([FACTS[1], FACTS[3], OTHER_WORDING], **SETTINGS, base_editor=editor, null_space_threshold=0.5)
    assert _difference(model, other) < 1e-5


@pytest.mark.usefixtures("given_values")
def test_facts_about_one_subject_are_inserted_together_with_the_rest_once_only_one_is_left(make):
    """Two of them take a group each, the second on top of the first."""
    model, other = make(), make()
    facts = [*FACTS, OTHER_WORDING, *MORE]
    model.edit(facts, **SETTINGS)
    model.remove_edits(_ids(FACTS[0]))
    other.edit(model.list_edits(), **SETTINGS)
    assert other.list_edits() == model.list_edits()
    assert _difference(model, other) < 1e-5
    assert torch.equal(model.packs["default"].tensors["edits"], other.packs["default"].tensors["edits"])


@pytest.mark.usefixtures("given_values")
@pytest.mark.parametrize("out", [FACTS[1], MORE[1]], ids=["first edit", "second edit"])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_a_pack_that_grew_is_made_again_edit_by_edit_each_with_its_own_seed(make, name, out):
    model, other = make(name), make(name)
    for one in (model, other):
        for seed, facts in enumerate((FACTS, MORE, [OTHER_WORDING])):
            left = [fact for fact in facts if one is model or fact != out]
            one.edit(left, **SETTINGS, seed=seed, base_editor="memit")
    model.remove_edits(_ids(out))
    assert model.list_edits() == other.list_edits()
    assert _difference(model, other) < 1e-5
    assert torch.equal(model.packs["default"].tensors["edits"], other.packs["default"].tensors["edits"])
    model.remove_edits(_ids(*(fact for fact in MORE if fact != out)))
    assert len(model.packs["default"].tensors["edits"]) == 2


@pytest.mark.usefixtures("given_values")
def test_what_lies_below_the_first_change_stays_bit_for_bit(make, monkeypatch):
    model = make()
    model.edit(FACTS, **SETTINGS)
    below = model.packs["default"].tensors
    model.edit(MORE, **SETTINGS)
    monkeypatch.setattr(job, "sample_contexts", lambda *_: pytest.fail("nothing is to be inserted"))
    model.remove_edits(_ids(*MORE))
    assert all(torch.equal(tensor, below[name]) for name, tensor in model.packs["default"].tensors.items())


@pytest.mark.usefixtures("given_values")
def test_a_loaded_pack_gives_the_same(make, tmp_path):
    model, other = make(), make()
    model.edit(FACTS, **SETTINGS)
    model.save_pretrained(tmp_path / "pack")
    other.load_pack(tmp_path / "pack")
    for one in (model, other):
        one.remove_edits(_ids(FACTS[1]))
    assert model.packs["default"].tensors.keys() == other.packs["default"].tensors.keys()
    assert all(torch.equal(t, other.packs["default"].tensors[name]) for name, t in model.packs["default"].tensors.items())
    model.save_pretrained(tmp_path / "less")
    assert EditPack.from_pretrained(tmp_path / "less").facts == (FACTS[0], *FACTS[2:])


@pytest.mark.usefixtures("given_values")
def test_a_pack_on_top_of_another_is_made_again_on_top_of_it(make):
    model, other = make(), make()
    for one in (model, other):
        one.edit(MORE, **SETTINGS, pack_name="below")
        one.edit(FACTS if one is model else FACTS[1:], **SETTINGS)
    below = model.packs["below"]
    model.remove_edits(_ids(FACTS[0]))
    assert _difference(model, other) < 1e-5
    assert model.packs["below"] == below
    assert model.packs["default"].parent == below.digest


@pytest.mark.usefixtures("given_values")
def test_a_fact_that_is_replaced_leaves_no_trace(make):
    new = FACTS[0].replace(target="Madrid")
    model, other = make(), make()
    model.edit(FACTS, **SETTINGS)
    model.edit(new, **SETTINGS, on_conflict="replace")
    other.edit(FACTS[1:], **SETTINGS)
    other.edit(new, **SETTINGS)
    assert model.list_edits() == other.list_edits() == [*FACTS[1:], new]
    assert _difference(model, other) < 1e-5


def test_optimised_values_are_stored_as_they_were_inserted_also_where_they_were_raised(make):
    """Each removal begins with making the edit again from them."""
    model = make()
    model.edit(FACTS, **{**SETTINGS, "retries": 2, "steps": 3})
    other = make()
    other.edit(FACTS, **{**SETTINGS, "steps": 3})
    values = [one.packs["default"].tensors["values"] for one in (model, other)]
    assert not torch.allclose(*values)
    exact = model.packs["default"].remove(_ids(FACTS[1]))
    model.remove_edits(_ids(FACTS[1]))
    assert model.packs["default"] != exact


def test_with_optimised_values_it_is_an_edit_of_the_others_to_what_adam_makes_of_rounding(make):
    model, other = make(), make()
    model.edit(FACTS, **SETTINGS)
    solved = _solved(model, FACTS[1])
    model.remove_edits(_ids(FACTS[1]))
    other.edit([FACTS[0], *FACTS[2:]], **SETTINGS)
    print(_difference(model, other), _difference(solved, other))
    assert _difference(model, other) < 1e-3
    assert _difference(solved, other) > 1e-2


@pytest.mark.usefixtures("given_values")
@pytest.mark.parametrize("what", ["sum", "settings", "values", "huge values", "given", "statistics", "contexts", "solved"])
def test_what_can_not_be_made_again_is_solved_and_said(make, caplog, what):
    model = make()
    if what == "settings":
        model.edit(MORE, **{**SETTINGS, "covariance_weight": 1.0})
        model.edit(FACTS, **SETTINGS)
        out = MORE[0]
    else:
        model.edit(FACTS, **SETTINGS)
        out = FACTS[0]
    pack = model.packs["default"]
    if what == "sum":
        model.rollback()
        model.edit(MORE, **SETTINGS)
        pack, out = pack + model.packs["default"], MORE[0]
    if what == "values":
        values = pack.tensors["values"].flip(0)
        pack = _with(pack, tensors={**pack.tensors, "values": values})
    if what == "huge values":
        pack = _with(pack, tensors={**pack.tensors, "values": torch.full_like(pack.tensors["values"], 1e12)})
    stranger = {
        "given": {"statistics": "given", "statistics_tokens": None},
        "statistics": {"statistics": "some/repo", "statistics_tokens": None},
        "contexts": {"contexts": 10**12},
    }
    pack = _with(pack, config=type(pack.config).from_dict({**pack.config.to_dict(), **stranger.get(what, {})}))
    if what == "solved":
        pack, out = pack.remove(_ids(FACTS[1])), FACTS[0]
    model.rollback()
    clean = snapshot(model.base_model)
    model.load_pack(pack)
    with caplog.at_level(logging.WARNING):
        model.remove_edits(_ids(out))
    assert "can't be made again" in caplog.text
    assert model.packs["default"] == pack.remove(_ids(out))
    model.rollback()
    assert same(clean, model.base_model)


def _with(pack, tensors=None, config=None):
    fit = type(pack.fit)(tensors or pack.tensors, pack.fit.modules, pack.facts)
    return EditPack(pack.method, config or pack.config, fit, pack.base)


@pytest.mark.usefixtures("given_values")
def test_an_error_in_the_middle_leaves_the_model_as_it_was(make, monkeypatch):
    model = make()
    model.edit(FACTS, **SETTINGS)
    pack, edited = model.packs["default"], snapshot(model.base_model)
    insert, calls = job.Job.insert, []

    def second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return insert(*arguments)

    monkeypatch.setattr(job.Job, "insert", second)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.remove_edits(_ids(FACTS[0]))
    assert model.packs == {"default": pack}
    assert same(edited, model.base_model)


@pytest.mark.usefixtures("given_values", "interruptible")
def test_a_removal_interrupted_anywhere_leaves_the_model_as_it_was(make):
    model = make()
    model.edit(FACTS, **SETTINGS, pack_name="below")
    model.edit(MORE, **SETTINGS)
    packs, edited = model.packs, snapshot(model.base_model)
    folder = Path(hf_edit.__file__).parent
    names = ("model.py", "restore.py", "weights/attach.py", "methods/steam/again.py", "methods/steam/job.py")
    watched = {str(folder / name) for name in names}

    points = 0
    while interrupted(lambda: model.remove_edits(_ids(MORE[0])), watched, 1 + 47 * points):
        points += 1
        if model.packs != packs:  # it came when all was done
            break
        assert same(edited, model.base_model), points
        assert model.active_packs == ["below", "default"]
        assert not any(module._forward_hooks for module in model.base_model.modules())
        assert all(parameter.requires_grad for parameter in model.base_model.parameters())
    print(f"{points} interrupts")
    assert points > 10
    assert model.packs["default"].facts == tuple(MORE[1:])
