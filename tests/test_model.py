"""Editing end to end on tiny models of many architectures."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import math
import pickle
import signal
import sys
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, interrupted, same, snapshot, tiny_model

from hf_edit import (
    ConflictingEditsError,
    EditableModelForCausalLM,
    Fact,
    MergeError,
    SteamConfig,
    UnsupportedArchitectureError,
    answers,
    available_methods,
    report,
    restore,
)
from hf_edit.base import Base
from hf_edit.methods import get_method
from hf_edit.methods.lks import swap, swap_entity
from hf_edit.positions import fact_text

QUICK = {
    "steam": QUICK_STEAM,
    "memit": QUICK_STEAM,
    "rome": QUICK_STEAM,
    # a tiny model's keys fill all directions: "null" are those that they use less
    "alphaedit": {**QUICK_STEAM, "null_space_threshold": 0.5, "ridge": 0.01},
    "lks": QUICK_LKS,
}


def _landed(report):
    """Whether the targets gained clearly. Random weights can't be made to say anything; that is for the real model's tests."""
    gains = [math.log(result.probability / result.probability_before) for result in report]
    return sum(gains) / len(gains) > 0.5


def _edit(model, facts=FACTS, method="steam", **kwargs):
    return model.edit(facts, method, progress=False, **{**QUICK[method], **kwargs})


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_edits_land_and_roll_back_bit_for_bit_on_every_architecture(architecture, tokenizer, method):
    model = EditableModelForCausalLM(tiny_model(architecture), tokenizer)
    before = snapshot(model.base_model)
    ids = torch.tensor([[5, 6, 7, 8]])
    clean = model(input_ids=ids).logits
    report = _edit(model, method=method)
    assert _landed(report), str(report)
    assert list(before) == list(model.base_model.state_dict())
    model.rollback()
    assert same(before, model.base_model)
    assert torch.equal(clean, model(input_ids=ids).logits)
    assert not model.list_edits()


@pytest.mark.parametrize("method", ["steam", "rome", "memit", "alphaedit"])
def test_a_single_fact_lands_with_every_base_editor(llama, method):
    assert _landed(_edit(llama, FACTS[0], method))


@pytest.mark.parametrize("method", ["memit", "alphaedit"])
def test_a_later_batch_leaves_the_earlier_one_in_place(llama, method):
    first = _edit(llama, FACTS[:2], method)
    assert _landed(first)
    assert _landed(_edit(llama, FACTS[2:], method))
    now = llama.evaluate(FACTS[:2], metrics=["efficacy"], mode="teacher_forced", progress=False)
    gains = [math.log(r.probability / r.probability_before) for r in first]
    left = [-row.scores["efficacy.nll"] - math.log(r.probability_before) for r, row in zip(first, now, strict=True)]
    assert sum(left) > 0.5 * sum(gains)
    assert [f.target for f in llama.list_edits()] == [f.target for f in FACTS]


def test_two_facts_on_one_subject_are_not_averaged(llama):
    """In one batch they would share a key, which would get the mean of their values."""
    facts = [Fact("France", "The capital of {} is", "Tokyo"), FACTS[1], Fact("France", "{} is in", "Berlin")]
    report = _edit(llama, facts, "memit")
    assert _landed(report)
    pack = llama.packs["default"]
    assert {f.id for f in pack.facts} == {f.id for f in facts}
    assert [f.target for f in pack.facts] == ["Tokyo", FACTS[1].target, "Berlin"]  # in the order of the factors
    llama.remove_edits(facts[0].id)
    assert {f.id for f in llama.list_edits()} == {facts[1].id, facts[2].id}


def test_an_editor_by_itself_takes_no_other_editor_and_not_another_methods_settings(llama):
    with pytest.raises(ValueError, match="take method='steam'"):
        llama.edit(FACTS, "memit", base_editor="alphaedit", statistics_tokens=1024)
    with pytest.raises(ValueError, match="takes a SteamConfig, not a BaselineConfig"):
        llama.edit(FACTS, "steam", config=get_method("memit").config_class())


def test_base_editors_by_themselves_are_as_in_their_papers():
    for method in ("rome", "memit", "alphaedit"):
        config = get_method(method).config_class()
        assert (config.kl_factor, config.kept_prompts, config.enough, config.balance) == (0.0625, 1, None, False)
        assert (config.rotation, config.tail_factor, config.anchor_weight) == (1, 0.0, 0.0)


def test_sparing_settings_are_settings_like_any_other(llama):
    config = SteamConfig.sparing(steps=3, kl_factor=1.0)
    assert (config.kept_prompts, config.kl_factor, config.steps) == (9, 1.0, 3)
    assert SteamConfig.from_dict(config.to_dict()) == config
    report = llama.edit(FACTS[:2], config=config, statistics_tokens=1024, contexts=0, anchor_weight=0.0, progress=False)
    assert len(report) == 2
    assert llama.packs["default"].config.kept_prompts == 9


def test_the_report_shows_the_perplexity_and_warns_before_a_collapse(llama, monkeypatch, caplog):
    monkeypatch.setattr("hf_edit.model.COLLAPSE", 1e9)
    report = _edit(llama, FACTS[:2])
    assert report.perplexity_clean > 0
    assert report.perplexity == pytest.approx(llama.perplexity())
    assert report.notes == ()
    assert "perplexity" in str(report)
    monkeypatch.setattr("hf_edit.model.COLLAPSE", 1e-9)
    report = _edit(llama, FACTS[2:])
    assert "writes worse" in report.notes[0]
    assert "writes worse" in caplog.text
    llama.rollback()
    assert llama.perplexity() == pytest.approx(report.perplexity_clean)
    assert _edit(llama, FACTS[:2], "lks").perplexity is None  # weights untouched


def test_rome_takes_several_facts_one_after_another(llama):
    assert _landed(_edit(llama, method="rome"))


def test_the_alignment_term_pulls_the_value_to_its_anchor(tokenizer):
    """Without it the same seed gives another value; the report says how many references stand behind it."""
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    references = [Fact(f"Number {n}", "{} is in", "Peru") for n in range(12)]
    packs = {}
    for weight in (0.0, 50.0):
        settings = {"references": references, "anchor_weight": weight, "min_references": 1, "steps": 5}
        report = _edit(model, FACTS[2], **settings)
        packs[weight] = model.packs["default"]
        model.rollback()
    assert "reference" in report.results[0].note or "anchor" in report.results[0].note
    recalled = "no anchor" not in report.results[0].note
    left = [packs[w].tensors[f"{packs[w].fit.modules[0]}.left"] for w in packs]
    assert torch.equal(*left) != recalled


def test_edits_come_on_top_of_each_other_and_single_ones_come_off_again(llama):
    _edit(llama, FACTS[:2])
    report = _edit(llama, FACTS[2:])
    assert _landed(report), str(report)
    assert llama.list_edits() == FACTS
    llama.remove_edits(str(FACTS[1].id))
    assert llama.list_edits() == [FACTS[0], *FACTS[2:]]
    llama.remove_edits([str(f.id) for f in llama.list_edits()])
    assert llama.packs == {}


def test_weight_and_lks_packs_work_together(llama):
    before = snapshot(llama.base_model)
    assert _landed(_edit(llama, FACTS[:2]))
    assert _landed(_edit(llama, FACTS[2:], "lks", pack_name="lks"))
    assert llama.active_packs == ["default", "lks"]
    llama.set_packs("lks")
    assert same(before, llama.base_model)
    assert llama.list_edits() == FACTS[2:]
    llama.set_packs(["default", "lks"])
    llama.delete_pack("default")
    assert same(before, llama.base_model)


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_facts_join_a_pack_of_their_method(llama, method):
    _edit(llama, FACTS[:2], method)
    assert _landed(_edit(llama, FACTS[2:], method))
    assert list(llama.packs["default"].facts) == FACTS


def test_disabling_edits_gives_the_clean_model_and_puts_them_back(llama):
    prompt = FACTS[0].question
    clean = llama.ask(prompt)
    _edit(llama)
    edited = llama.ask(prompt)
    with llama.disable_edits():
        assert llama.ask(prompt) == clean
    assert llama.ask(prompt) == edited
    assert edited != clean


@pytest.mark.parametrize("method", ["steam", "lks"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", ["fit", "attach"])
def test_an_edit_that_fails_leaves_the_model_as_it_was(llama, monkeypatch, method, error, after):
    _edit(llama, FACTS[:1])
    before, answer = snapshot(llama.base_model), llama.ask(FACTS[0].question)
    how = type(get_method(method))
    original = getattr(how, after)

    def failing(self, base, what, *args, **kwargs):
        if after == "attach" and len(what.facts) == 1:  # the pack that was there
            return original(self, base, what, *args, **kwargs)
        if after == "fit":
            original(self, base, what, *args, **kwargs)
        raise error("stop")

    monkeypatch.setattr(how, after, failing)
    with pytest.raises(error):
        _edit(llama, FACTS[1:], method, pack_name="default" if method == "steam" else "other")
    monkeypatch.undo()
    assert same(before, llama.base_model)
    assert llama.list_edits() == FACTS[:1]
    assert llama.ask(FACTS[0].question) == answer


def test_contradictions_follow_on_conflict(llama):
    other = FACTS[0].replace(target="written")
    _edit(llama, FACTS[:2])
    with pytest.raises(ConflictingEditsError, match="on_conflict"):
        _edit(llama, other)
    assert _edit(llama, other, on_conflict="keep").results == ()
    assert _landed(_edit(llama, other, on_conflict="replace"))
    assert llama.list_edits() == [FACTS[1], other]


def test_a_pack_holds_edits_of_one_method(llama):
    _edit(llama, FACTS[:1])
    with pytest.raises(ConflictingEditsError, match="pack_name='lks'"):
        _edit(llama, FACTS[1:], "lks")


def test_merging_leaves_a_plain_model_that_answers(tokenizer):
    model = EditableModelForCausalLM(tiny_model("gpt2"), tokenizer)
    _edit(model)
    answers = model.ask([f.question for f in FACTS])
    merged = model.merge_and_unload()
    assert type(merged).__name__ == "GPT2LMHeadModel"
    assert EditableModelForCausalLM(merged, tokenizer).ask([f.question for f in FACTS]) == answers


def test_what_cannot_be_merged_says_why_and_what_to_do(llama, tokenizer):
    _edit(llama, method="lks")
    with pytest.raises(MergeError, match="method='steam'"):
        llama.merge_and_unload()
    offloaded = EditableModelForCausalLM(tiny_model("llama").to(torch.bfloat16), tokenizer)
    _edit(offloaded)
    with torch.device("meta"):
        projection = offloaded.base_model.get_submodule(offloaded.packs["default"].fit.modules[0])
        projection.weight = torch.nn.Parameter(torch.empty(48, 96))
    with pytest.raises(MergeError, match="quantised or offloaded"):
        offloaded.merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edit_is_merged_into_half_precision_where_no_fact_is_lost(tokenizer, dtype, caplog):
    caplog.set_level(logging.INFO, "hf_edit")
    model = EditableModelForCausalLM(tiny_model("llama").to(dtype), tokenizer)
    clean = snapshot(model.base_model)
    _edit(model, FACTS[:1], pack_name="one")
    _edit(model, FACTS[1:2], pack_name="two")
    ids = torch.tensor([tokenizer(FACTS[0].question)["input_ids"]])
    with torch.no_grad():
        edited = model(input_ids=ids).logits[0, -1].float()
        plain = model.merge_and_unload()
        now = plain(input_ids=ids).logits[0, -1].float()
        assert all(tensor.dtype == dtype for tensor in snapshot(plain).values())
        plain.load_state_dict(clean)
        before = plain(input_ids=ids).logits[0, -1].float()
    assert model.packs == {}
    assert (now - edited).norm() < 0.2 * (before - edited).norm()
    assert "of the change arrived" in caplog.text


def test_a_merge_that_would_lose_a_fact_is_refused_and_changes_nothing(tokenizer, monkeypatch):
    model = EditableModelForCausalLM(tiny_model("llama").bfloat16(), tokenizer)
    clean = snapshot(model.base_model)
    _edit(model, FACTS[:2])
    ids = torch.tensor([tokenizer(FACTS[0].question)["input_ids"]])
    edited, answered = model(input_ids=ids).logits, iter([True, False])

    def ask(facts, progress):
        said = next(answered)
        return [report.Answer("", said, 1.0) for _ in facts]

    monkeypatch.setattr(model, "_ask", ask)
    with pytest.raises(MergeError, match=r"(?s)2 of 2 facts .* dtype=torch\.float32"):
        model.merge_and_unload()
    assert torch.equal(model(input_ids=ids).logits, edited)
    model.rollback()
    assert same(clean, model.base_model)


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_half_precision_models_are_edited_in_their_own_dtype(tokenizer, method):
    model = EditableModelForCausalLM(tiny_model("llama").to(torch.bfloat16), tokenizer)
    before = snapshot(model.base_model)
    report = _edit(model, method=method)
    assert _landed(report), str(report)
    assert model.dtype == torch.bfloat16
    model.rollback()
    assert same(before, model.base_model)


def test_the_wrapper_delegates_to_its_base(llama):
    assert llama.config is llama.base_model.config
    assert llama.device == torch.device("cpu")
    assert llama.get_input_embeddings() is llama.base_model.get_input_embeddings()
    with pytest.raises(AttributeError):
        _ = llama.no_such_thing


def test_wrapping_twice_is_refused(llama):
    with pytest.raises(ValueError, match="get_base_model"):
        EditableModelForCausalLM(llama)


def test_a_wrong_setting_is_named_with_the_one_that_was_meant(llama):
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        llama.edit(FACTS, stepps=3)
    with pytest.raises(ValueError, match="steps must be int"):
        llama.edit(FACTS, steps="many")
    with pytest.raises(ValueError, match="lks"):
        llama.edit(FACTS, method="no-such-method")
    assert {"steam", "lks", "rome", "memit", "alphaedit"} <= set(available_methods())


def test_the_model_is_left_in_the_mode_it_was_in(llama):
    llama.base_model.train()
    llama.base_model.lm_head.weight.requires_grad_(False)
    _edit(llama, FACTS[:1], verify=False)
    assert llama.base_model.training
    assert sum(not p.requires_grad for p in llama.base_model.parameters()) == 1


def test_fitting_does_not_touch_the_callers_random_numbers(llama):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    _edit(llama, FACTS[:2], verify=False)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_the_same_seed_gives_the_same_edit(tokenizer, method):
    packs = []
    for _ in range(2):
        model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
        _edit(model, method=method, verify=False)
        packs.append(copy.copy(model.packs["default"]))
    assert packs[0] == packs[1]


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_moving_or_casting_an_edited_model_keeps_edits_and_rollback(llama, method):
    clean = {name: t.to(torch.float64) for name, t in snapshot(llama.base_model).items()}
    _edit(llama, method=method)
    llama.to(torch.float64)
    assert {p.dtype for p in llama.base_model.parameters()} == {torch.float64}
    assert llama.ask(FACTS[0].question)
    llama.rollback()
    assert same(clean, llama.base_model)


def test_what_is_edited_while_edits_are_disabled_stays_in_force(llama):
    _edit(llama, FACTS[:1])
    with llama.disable_edits():
        _edit(llama, FACTS[1:2], pack_name="new")
    assert llama.active_packs == ["default", "new"]


@pytest.fixture
def switching():
    """Threads that are switched between as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def _together(*actions):
    """Run each in a thread of its own; what they raised."""
    errors = []

    def run(action):
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "the threads wait for each other"
    return errors


@pytest.mark.usefixtures("switching")
def test_threads_that_disable_edits_at_once_leave_them_as_they_were(llama):
    clean = snapshot(llama.base_model)
    _edit(llama)
    edited = snapshot(llama.base_model)

    def disable():
        for _ in range(25):
            with llama.disable_edits():
                assert same(clean, llama.base_model)

    assert _together(*[disable] * 4) == []
    assert llama.active_packs == ["default"]
    assert same(edited, llama.base_model)
    llama.rollback()
    assert same(clean, llama.base_model)


@pytest.mark.usefixtures("switching")
def test_nothing_that_threads_change_at_once_is_lost(llama):
    clean = snapshot(llama.base_model)
    packs = []
    for i, fact in enumerate(FACTS):
        _edit(llama, fact, pack_name=str(i), method="memit")
        packs.append(llama.packs[str(i)])
        llama.rollback()

    def load(i):
        llama.load_pack(packs[i], f"{i}-twice")
        llama.delete_pack(f"{i}-twice")
        with llama.disable_edits():
            pass
        llama.load_pack(packs[i], str(i))

    assert _together(*[lambda i=i: load(i) for i in range(4)]) == []
    assert sorted(llama.active_packs) == sorted(llama.packs) == ["0", "1", "2", "3"]
    for name in ("2", "0", "3", "1"):
        llama.delete_pack(name)
    assert same(clean, llama.base_model)


def test_an_edit_that_fails_takes_back_nothing_of_other_threads(llama, monkeypatch):
    _edit(llama, FACTS[0], method="memit")
    pack = llama.packs["default"]
    llama.rollback()
    failing = threading.Event()
    restore = llama._put

    def slowly(*state):
        restore(*state)
        if failing.is_set():
            time.sleep(0.05)

    def fail(*_, **__):
        failing.set()
        time.sleep(0.2)  # the other thread waits for its turn
        raise RuntimeError("no fit")

    monkeypatch.setattr(llama, "_put", slowly)
    monkeypatch.setattr(llama, "_fit", fail)

    def load():
        failing.wait()
        llama.load_pack(pack, "other")

    (error,) = _together(lambda: _edit(llama, FACTS[1]), load)
    assert str(error) == "no fit"
    assert llama.active_packs == ["other"]


def test_a_change_waits_for_threads_that_need_the_model_clean(llama):
    _edit(llama, FACTS[0], method="memit")
    pack = llama.packs["default"]
    llama.rollback()
    seen, inside, loaded = [], threading.Event(), threading.Event()

    def look():
        with llama.disable_edits():
            inside.set()
            loaded.wait(0.3)
            seen.append((loaded.is_set(), llama.active_packs))

    def load():
        inside.wait()
        llama.load_pack(pack, "late")
        loaded.set()

    assert _together(look, load) == []
    assert seen == [(False, [])]
    assert llama.active_packs == ["late"]


def test_edits_return_when_the_last_thread_needs_the_model_no_more_clean(llama):
    _edit(llama)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with llama.disable_edits():
            first_in.set()
            second_in.wait()
        first_out.set()

    def second():
        first_in.wait()
        with llama.disable_edits():
            second_in.set()
            first_out.wait()
            with llama.disable_edits():
                pass
            seen.append(llama.active_packs)

    assert _together(first, second) == []
    assert seen == [[]]
    assert llama.active_packs == ["default"]


def test_a_context_may_be_left_by_another_thread_than_entered_it(llama):
    """As a generator's is, which a pool of workers steps in turn."""
    _edit(llama)

    def stream():
        with llama.disable_edits():
            while True:
                yield llama.active_packs

    stepped = stream()
    assert _together(lambda: next(stepped)) == []
    assert llama.active_packs == []
    assert _together(stepped.close) == []
    assert llama.active_packs == ["default"]
    assert _together(llama.rollback) == []


def test_contexts_that_end_in_the_order_in_which_they_began_keep_the_model_clean_until_the_last(llama):
    _edit(llama)
    first, second = llama.disable_edits(), llama.disable_edits()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert llama.active_packs == []
    second.__exit__(None, None, None)
    assert llama.active_packs == ["default"]


def test_edits_return_beneath_what_was_put_on_while_they_were_disabled(llama):
    _edit(llama, FACTS[0], pack_name="old", method="memit")
    inside, left = threading.Event(), threading.Event()

    def put_on():
        with llama.disable_edits():
            _edit(llama, FACTS[1], pack_name="new", method="memit")
            inside.set()
            left.wait()

    def look():
        inside.wait()
        with llama.disable_edits():
            pass
        left.set()

    assert _together(put_on, look) == []
    assert llama.active_packs == ["old", "new"]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_another_thread_changes_the_model_leaves_no_context_open(llama):
    _edit(llama)
    held, release = threading.Event(), threading.Event()

    def hold():
        with llama.disable_edits(), llama._turns.change():
            held.set()
            release.wait()

    other = threading.Thread(target=hold, daemon=True)
    context = llama.disable_edits()
    context.__enter__()
    other.start()
    held.wait()
    threading.Timer(0.2, lambda: (signal.raise_signal(signal.SIGINT), time.sleep(0.2), release.set())).start()
    with pytest.raises(KeyboardInterrupt):
        context.__exit__(None, None, None)
    other.join(10)
    assert llama.active_packs == ["default"]
    assert _together(llama.rollback) == []


def test_threads_that_come_and_go_let_a_change_through(llama):
    _edit(llama)
    stop = threading.Event()

    def disable():
        while not stop.is_set():
            with llama.disable_edits():
                time.sleep(0.01)

    def change():
        time.sleep(0.05)
        llama.rollback()
        stop.set()

    assert _together(disable, disable, disable, change) == []
    assert llama.packs == {}


def test_nobody_waits_for_a_pack_that_is_being_fetched(llama, tmp_path, monkeypatch):
    _edit(llama, FACTS[0], method="memit")
    pack = llama.packs["default"]
    llama.rollback()
    fetching, looked = threading.Event(), threading.Event()

    def slowly(*_, **__):
        fetching.set()
        assert looked.wait(30)
        return pack

    def look():
        fetching.wait()
        with llama.disable_edits():
            looked.set()

    monkeypatch.setattr(type(pack), "from_pretrained", slowly)
    assert _together(lambda: llama.load_pack("me/lyon"), look) == []
    assert llama.active_packs == ["default"]


def test_merging_where_edits_are_disabled_is_refused(llama):
    _edit(llama)
    with llama.disable_edits(), pytest.raises(MergeError, match="leave that context"):
        llama.merge_and_unload()
    assert llama.active_packs == ["default"]


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_threads_that_run_the_model_get_the_old_or_the_new_one_never_a_mixture(llama, method):
    """Two threads generate, one disables the edits and generates, one edits and rolls back: all at once."""
    ids = llama.tokenizer(FACTS[0].question, return_tensors="pt")["input_ids"]
    settings = QUICK_STEAM if method == "steam" else QUICK_LKS

    def answer():
        with torch.no_grad():
            return llama.forward(input_ids=ids).logits[0, -1].tolist()

    clean = answer()
    llama.edit(FACTS[:1], method, verify=False, progress=False, **settings)
    edited = answer()
    llama.rollback()
    assert clean != edited
    seen, seen_clean = [], []

    def run():
        seen.extend(answer() for _ in range(30))

    def run_clean():
        for _ in range(10):
            with llama.disable_edits():
                seen_clean.append(answer())

    def change():
        for _ in range(4):
            llama.edit(FACTS[:1], method, verify=False, progress=False, **settings)
            llama.rollback()

    assert _together(run, run, run_clean, change) == []
    assert all(one in (clean, edited) for one in seen)
    assert all(one == clean for one in seen_clean)
    assert answer() == clean


def test_continuous_batching_is_refused_where_edits_act_at_mentions(llama):
    llama.edit(FACTS[:1], "lks", verify=False, progress=False, **QUICK_LKS)
    with pytest.raises(NotImplementedError, match=r"model\.generate"):
        llama.generate_batch([[1, 2, 3]])


def test_threads_that_edit_while_they_have_edits_disabled_do_not_wait_for_each_other(llama):
    both = threading.Barrier(2)

    def edit(i):
        with llama.disable_edits():
            both.wait()
            _edit(llama, FACTS[i], pack_name=str(i), method="memit")

    assert _together(lambda: edit(0), lambda: edit(1)) == []
    assert sorted(llama.active_packs) == ["0", "1"]


def test_editing_works_where_gradients_are_off(llama):
    with torch.inference_mode():
        assert _landed(_edit(llama, FACTS[:1]))


def test_the_last_block_can_be_edited_though_no_anchor_lies_above_it(llama):
    fact = Fact("France", "The capital of {}", "Lyon")
    assert len(_edit(llama, fact, layers=[5], anchor_weight=1.0)) == 1


@pytest.mark.parametrize("verify", [True, False])
def test_an_edit_without_effect_is_refused_and_taken_back(llama, verify):
    """What the last block writes at a subject reaches no later token; dropout is no effect."""
    for block in llama.base_model.model.layers:
        block.self_attn.attention_dropout = 0.5
    llama.train()
    clean = snapshot(llama.base_model)
    with pytest.raises(UnsupportedArchitectureError, match="no effect"):
        _edit(llama, FACTS[:1], layers=[5], verify=verify)
    assert same(clean, llama.base_model)
    assert llama.packs == {}


def test_a_model_with_broken_weights_is_refused_before_anything_is_fitted(llama):
    with torch.no_grad():
        llama.base_model.model.layers[2].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="the model's own logits hold NaN"):
        _edit(llama, verify=False)


def test_nothing_is_made_that_could_not_be_loaded(llama):
    twice = [fact.replace(id="1") for fact in FACTS[:2]]
    with pytest.raises(ConflictingEditsError, match="id '1'"):
        _edit(llama, twice)
    for name in ("../up", "", "a/b", ".hidden", "facts.jsonl"):
        with pytest.raises(ValueError, match="no name for a pack"):
            _edit(llama, pack_name=name)
    with pytest.raises(ValueError, match="single letter"):
        _edit(llama, Fact("X", "The owner of {} is", "Rome"), "lks")
    _edit(llama, FACTS[:1], "lks", width=0.5)
    with pytest.raises(ConflictingEditsError, match=r"width=0\.5"):
        _edit(llama, FACTS[1:], "lks", width=1.0)
    quick = {name: value for name, value in QUICK_LKS.items() if name != "width"}
    llama.edit(FACTS[1:], "lks", progress=False, **quick)
    assert llama.packs["default"].config.width == 0.5


def test_a_pack_is_put_on_once_however_often_it_is_named(llama):
    _edit(llama, FACTS[:1])
    once = snapshot(llama.base_model)
    llama.set_packs(["default", "default"])
    assert same(once, llama.base_model)
    with pytest.raises(ConflictingEditsError, match="in force already"):
        llama.load_pack(llama.packs["default"], "again")


def test_an_inactive_pack_does_not_lose_facts_unasked(llama):
    _edit(llama, FACTS[:1])
    llama.set_packs([])
    with pytest.raises(ConflictingEditsError, match="on_conflict"):
        _edit(llama, FACTS[0].replace(target="Vienna"))


def test_an_attachment_that_fails_half_way_leaves_nothing_behind(llama, monkeypatch):
    clean = snapshot(llama.base_model)
    _edit(llama, FACTS[:1], pack_name="a")
    _edit(llama, FACTS[1:2], pack_name="b")
    attach = type(llama)._attach
    calls = []

    def failing(self, pack):
        calls.append(pack)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return attach(self, pack)

    monkeypatch.setattr(type(llama), "_attach", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        _edit(llama, FACTS[2:], pack_name="c", verify=False)
    monkeypatch.undo()
    assert llama.active_packs == ["a", "b"]
    llama.rollback()
    assert same(clean, llama.base_model)


# --- how much of an answer is read ------------------------------------------------------------------------------------

SENTENCE = "the city of Tokyo, which lies in the country of Japan and is the capital of it, and then the city of Madrid"


def test_a_long_target_that_is_said_is_no_miss_and_short_ones_do_not_wait_for_it(llama, monkeypatch):
    facts = [FACTS[0], Fact("Spain", "The capital of {} is", SENTENCE), *FACTS[2:]]
    prompts = [tuple(llama.tokenizer(f.question)["input_ids"]) for f in facts]
    said = {p: llama.tokenizer(f" {f.target} and")["input_ids"] for p, f in zip(prompts, facts, strict=True)}
    assert len(said[prompts[1]]) > 40
    read = []

    def saying(base, rows, length, banned=None):
        read.append(({tuple(row) for row in rows}, length))
        return [said[tuple(row)][:length] for row in rows]

    monkeypatch.setattr(answers, "generate_ids", saying)
    report = _edit(llama, facts, "memit", steps=1)
    assert [result.success for result in report] == [True] * 4
    assert read[:2] == [(set(prompts) - {prompts[1]}, 16), ({prompts[1]}, 48)]
    assert read[2:] == read[:2]
    llama.ask(facts[1].question)
    assert read[-1] == ({prompts[1]}, 16)


def test_an_answer_is_read_as_far_as_its_target_needs_and_short_targets_need_no_more_than_before(llama):
    base = Base(llama.base_model, llama.tokenizer)

    def lengths(targets, least):
        return answers.answer_lengths(base, [fact_text(FACTS[0], target=target) for target in targets], least)

    words = ["Tokyo" + " Tokyo" * more for more in (0, 11, 12, 15, 40)]
    assert [len(llama.tokenizer(f" {text}")["input_ids"]) for text in words] == [1, 12, 13, 16, 41]
    assert lengths(words, 16) == [16, 16, 32, 32, 48]
    assert lengths(words, 20) == [20, 20, 20, 20, 52]
    assert lengths(words, 1) == [1, 12, 13, 16, 41]


def test_answers_of_different_lengths_are_those_of_each_prompt_alone(llama):
    base = Base(llama.base_model, llama.tokenizer)
    prompts = ["The capital of France is", "Yes", "The official language of Japan is", "In"]
    lengths = [3, 12, 12, 3]
    alone = [answers.greedy(base, [prompt], length)[0] for prompt, length in zip(prompts, lengths, strict=True)]
    assert answers.greedy(base, prompts, lengths, batch=2) == alone
    assert len(set(alone)) == 4


def test_a_second_wrapper_of_a_base_with_edits_is_refused(tokenizer):
    base = tiny_model("llama")
    one, other = EditableModelForCausalLM(base, tokenizer), EditableModelForCausalLM(base, tokenizer)
    _edit(one, FACTS[:1])
    with pytest.raises(ConflictingEditsError, match="roll its edits back"):
        EditableModelForCausalLM(base, tokenizer)
    for change in (lambda: _edit(other, FACTS[1:2]), other.rollback, other.evaluate):
        with pytest.raises(ConflictingEditsError, match="roll its edits back"):
            change()
    assert one.active_packs == ["default"]
    one.rollback()
    _edit(other, FACTS[1:2])
    other.merge_and_unload()
    EditableModelForCausalLM(base, tokenizer)


def test_a_base_that_a_lost_wrapper_has_edited_is_not_taken_for_clean(tokenizer):
    base = tiny_model("llama")
    lost = EditableModelForCausalLM(base, tokenizer)
    _edit(lost, FACTS[:1])
    del lost
    gc.collect()
    with pytest.raises(ConflictingEditsError, match="load the base model again"):
        EditableModelForCausalLM(base, tokenizer)


def test_a_state_dict_is_not_loaded_under_a_weight_edit(llama):
    clean = snapshot(llama.base_model)
    _edit(llama)
    edited = snapshot(llama.base_model)
    with pytest.raises(RuntimeError, match=r"model\.disable_edits"):
        llama.base_model.load_state_dict(clean)
    copied = copy.deepcopy(llama.base_model)
    copied.load_state_dict(clean)
    assert same(clean, copied)
    assert same(edited, llama.base_model)
    other = {name: tensor + 1 for name, tensor in clean.items()}
    with llama.disable_edits():
        llama.base_model.load_state_dict(other)
    llama.rollback()
    assert same(other, llama.base_model)
    llama.base_model.load_state_dict(clean)


def test_a_part_of_a_model_loads_no_state_dict_under_a_weight_edit_either(llama):
    inner = snapshot(llama.base_model.model)
    _edit(llama)
    with pytest.raises(RuntimeError, match=r"model\.disable_edits"):
        llama.base_model.model.load_state_dict(inner)
    others = {name: tensor for name, tensor in inner.items() if "down_proj" not in name}
    llama.base_model.model.load_state_dict(others, strict=False)


def test_a_state_dict_is_loaded_where_the_edit_stands_beside_the_weights(tokenizer):
    llama = EditableModelForCausalLM(tiny_model("llama").bfloat16(), tokenizer)
    clean = snapshot(llama.base_model)
    _edit(llama)
    llama.base_model.load_state_dict(clean)
    llama.rollback()
    assert same(clean, llama.base_model)


def test_a_pickled_base_loads_state_dicts(llama):
    clean = snapshot(llama.base_model)
    _edit(llama)
    twin = pickle.loads(pickle.dumps(llama.base_model))
    twin.load_state_dict(clean)
    assert same(clean, twin)


def test_a_merged_model_loads_state_dicts(llama):
    clean = snapshot(llama.base_model)
    _edit(llama)
    plain = llama.merge_and_unload()
    plain.load_state_dict(clean)
    assert same(clean, plain)


def test_what_is_trained_under_a_weight_edit_stays_and_all_else_is_rolled_back(llama):
    """Also where it is one column of a weight."""
    clean = snapshot(llama.base_model)
    _edit(llama)
    name = llama.packs["default"].fit.modules[-1]
    with torch.no_grad():
        llama.base_model.get_submodule(name).weight[:, 3] += 1
    llama.rollback()
    now = snapshot(llama.base_model)
    trained = now[f"{name}.weight"][:, 3] - clean[f"{name}.weight"][:, 3]
    torch.testing.assert_close(trained, torch.ones_like(trained))
    now[f"{name}.weight"][:, 3] = clean[f"{name}.weight"][:, 3]
    assert all(torch.equal(now[key], tensor) for key, tensor in clean.items())


def test_what_was_trained_stays_whatever_arithmetic_the_rollback_is_called_in(llama):
    clean = snapshot(llama.base_model)
    _edit(llama)
    name = llama.packs["default"].fit.modules[-1]
    with torch.no_grad():
        llama.base_model.get_submodule(name).weight[0, 0] += 1
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        llama.rollback()
    now = snapshot(llama.base_model)
    assert now[f"{name}.weight"][0, 0] - clean[f"{name}.weight"][0, 0] == pytest.approx(1, abs=1e-5)
    now[f"{name}.weight"][0, 0] = clean[f"{name}.weight"][0, 0]
    assert all(torch.equal(now[key], tensor) for key, tensor in clean.items())
    assert not any(parameter.is_inference() for parameter in llama.base_model.parameters())


def test_double_precision_is_edited(tokenizer):
    llama = EditableModelForCausalLM(tiny_model("llama").double(), tokenizer)
    assert _landed(_edit(llama, FACTS[:1], "memit"))


def test_packs_that_are_out_of_force_leave_the_base_to_others(llama):
    _edit(llama, FACTS[:1])
    llama.set_packs([])
    other = EditableModelForCausalLM(llama.base_model, llama.tokenizer)
    _edit(other, FACTS[1:2])
    with pytest.raises(ConflictingEditsError):
        llama.set_packs("default")
    with pytest.raises(ConflictingEditsError), llama.disable_edits():
        pass
    other.rollback()
    llama.set_packs("default")


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_anywhere_around_a_run_leaves_no_run_open(llama):
    """Else other threads' changes would wait for ever."""
    ids = torch.tensor([[5, 6, 7]])
    files = {restore.__file__}
    for line in range(1, 60):
        if not interrupted(lambda: llama.forward(input_ids=ids), files, line):
            break
        assert not llama._turns._running
    else:
        pytest.fail("the run has more lines than were tried")
    assert line > 10


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_anywhere_around_an_entity_swap_leaves_nothing_behind(llama):
    files = {swap.__file__, restore.__file__}

    def swapped():
        with swap_entity(llama, "France", "Spain"):
            pass

    for line in range(1, 400):
        if not interrupted(swapped, files, line):
            break
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.base_model.modules()), line
        assert not llama._turns.clean
    else:
        pytest.fail("the swap has more lines than were tried")


def test_an_entity_swap_ends_though_another_wrapper_has_edited_the_base_meanwhile(llama):
    other = EditableModelForCausalLM(llama.base_model, llama.tokenizer)
    with swap_entity(llama, "France", "Spain"):
        _edit(other, FACTS[:1])
    other.rollback()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.base_model.modules())


def test_rolling_back_inside_an_entity_swap_leaves_the_model_as_it_was(llama):
    clean, attributes = snapshot(llama.base_model), set(llama.base_model.__dict__)
    _edit(llama, FACTS[:1], "lks")
    with swap_entity(llama, "France", "Spain"):
        llama.rollback()
        _edit(llama, FACTS[1:2], "memit", pack_name="other")
    llama.rollback()
    assert same(clean, llama.base_model)
    assert set(llama.base_model.__dict__) == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.base_model.modules())


def test_an_edit_inside_an_entity_swap_is_fitted_without_it(llama):
    _edit(llama, FACTS[:1], "memit")
    alone = llama.packs["default"].fit.tensors
    llama.rollback()
    with swap_entity(llama, FACTS[0].subject, "Spain"):
        _edit(llama, FACTS[:1], "memit")
    assert all(torch.equal(tensor, alone[name]) for name, tensor in llama.packs["default"].fit.tensors.items())


class TestDisablingEditsAtMentions:
    """They are off on the thread or task that wants them off, and on for all others."""

    @pytest.fixture
    def edited(self, llama):
        self.ids = llama.tokenizer(FACTS[0].question, return_tensors="pt")["input_ids"]
        self.clean = self.answer(llama)
        _edit(llama, FACTS[:1], "lks", verify=False)
        self.changed = self.answer(llama)
        assert self.clean != self.changed
        return llama

    def answer(self, model):
        with torch.no_grad():
            return model.forward(input_ids=self.ids).logits[0, -1].tolist()

    def test_other_threads_go_on_with_them(self, edited):
        inside, asked, seen = threading.Event(), threading.Event(), {}

        def disable():
            with edited.disable_edits():
                inside.set()
                assert asked.wait(30), "the other thread waits"
                seen["clean"] = self.answer(edited), edited.active_packs, edited.list_edits()
                seen["base"] = self.answer(edited.base_model)
            seen["after"] = self.answer(edited)

        def ask():
            inside.wait()
            seen["edited"] = self.answer(edited), edited.active_packs
            asked.set()

        assert _together(disable, ask) == []
        assert seen["clean"] == (self.clean, [], [])
        assert seen["base"] == self.clean
        assert seen["edited"] == (self.changed, ["default"])
        assert seen["after"] == self.changed

    def test_tasks_have_them_off_each_for_itself(self, edited):
        async def asked(off):
            with edited.disable_edits() if off else nullcontext():
                await asyncio.sleep(0.01)
                return await asyncio.to_thread(self.answer, edited)

        async def both():
            return await asyncio.gather(*(asked(off) for off in (True, False, True, False)))

        assert asyncio.run(both()) == [self.clean, self.changed] * 2

    def test_a_task_is_measured_edited_while_another_has_them_off(self, edited):
        async def disable():
            with edited.disable_edits():
                await asyncio.sleep(0.05)
                return self.answer(edited)

        async def measure():
            await asyncio.sleep(0.01)
            report = edited.evaluate(mode="teacher_forced", progress=False)
            return report.values("efficacy.nll"), self.answer(edited), edited.perplexity()

        async def both():
            return await asyncio.gather(disable(), measure())

        expected = (
            edited.evaluate(mode="teacher_forced", progress=False).values("efficacy.nll"),
            self.changed,
            edited.perplexity(),
        )
        assert asyncio.run(both()) == [self.clean, expected]
        assert edited.active_packs == ["default"]

    def test_work_that_is_handed_on_inside_the_context_waits_for_nobody(self, edited):
        async def measured():
            with edited.disable_edits():
                return await asyncio.to_thread(lambda: (self.answer(edited), edited.perplexity()))

        answer, _ = asyncio.run(asyncio.wait_for(measured(), 60))
        assert answer == self.clean

    def test_a_generator_that_others_step_is_told_of(self, edited, caplog):
        def stream():
            with edited.disable_edits():
                for _ in range(2):
                    yield self.answer(edited)

        stepped = stream()

        async def step():
            return [await asyncio.to_thread(next, stepped, None) for _ in range(3)]

        asyncio.run(step())
        assert "left by another thread or task" in caplog.text
        assert self.answer(edited) == self.changed

    def test_another_model_keeps_its_own(self, edited, tokenizer):
        other = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
        other.load_pack(edited.packs["default"])
        with edited.disable_edits():
            assert self.answer(edited) == self.clean
            assert self.answer(other) == self.changed

    def test_they_are_back_wherever_the_context_is_left(self, edited):
        def stream():
            with edited.disable_edits():
                while True:
                    yield self.answer(edited)

        stepped, seen = stream(), []
        left, entered = threading.Event(), threading.Event()

        def enter():
            seen.append(next(stepped))
            entered.set()
            left.wait()
            seen.append(self.answer(edited))

        def leave():
            entered.wait()
            stepped.close()
            left.set()

        assert _together(enter, leave) == []
        assert seen == [self.clean, self.changed]
        assert _together(edited.rollback) == []

    def test_a_change_inside_the_context_holds_for_all(self, edited):
        inside, left, seen = threading.Event(), threading.Event(), []

        def change():
            with edited.disable_edits(), edited.disable_edits():
                _edit(edited, FACTS[1:2], "memit", pack_name="new", verify=False)
                seen.append(edited.active_packs)
                inside.set()
                left.wait()

        def look():
            inside.wait()
            seen.append(edited.active_packs)
            left.set()

        assert _together(change, look) == []
        assert seen == [["new"], ["new"]]
        assert edited.active_packs == ["default", "new"]
        edited.delete_pack("new")
        assert self.answer(edited) == self.changed

    def test_changes_by_others_wait_for_it(self, edited):
        inside, seen = threading.Event(), []

        def disable():
            with edited.disable_edits():
                inside.set()
                time.sleep(0.2)
                seen.append(self.answer(edited))
            seen.append("left")

        def change():
            inside.wait()
            edited.rollback()
            seen.append("changed")

        assert _together(disable, change) == []
        assert seen[0] == self.clean
        assert set(seen[1:]) == {"left", "changed"}
        assert self.answer(edited) == self.clean

    def test_continuous_batching_runs_without_them(self, edited, monkeypatch):
        """It runs the model in a thread of its own."""
        seen = []

        def generate_batch(_):
            seen.append(len(edited.base_model.model._forward_pre_hooks))

        monkeypatch.setattr(edited.base_model, "generate_batch", generate_batch, raising=False)
        with edited.disable_edits():
            edited.generate_batch([[1, 2, 3]])
        assert seen == [0]
        assert self.answer(edited) == self.changed
