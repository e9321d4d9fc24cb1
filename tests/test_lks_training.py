"""LKS: how generators are trained, kept, handed on and used without training."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import pytest
import torch
from conftest import FACTS, QUICK_LKS, VOCABULARY, same, snapshot, tiny_model
from transformers import OPTConfig, OPTForCausalLM

from hf_edit import BaseMismatchError, EditableModelForCausalLM, Fact, LKSConfig, LKSEditor
from hf_edit.methods.lks import bank_facts, checkpoint, editor, method, swap_entity, training
from hf_edit.methods.lks.examples import build_examples
from hf_edit.methods.lks.features import read_features
from hf_edit.methods.lks.generator import generator_of
from hf_edit.methods.lks.retelling import retold
from hf_edit.methods.lks.store import TensorStore

FEW = {**QUICK_LKS, "min_steps": 12}


def _edit(model, facts=FACTS, **settings):
    return model.edit(facts, "lks", progress=False, **{**QUICK_LKS, "verify": False, **settings})


def _gain(report):
    """How much likelier the targets became, in nats. Random weights can't be made to say anything."""
    return sum(math.log(row.probability / row.probability_before) for row in report) / len(report)


def _logits(model, prompt):
    with torch.no_grad():
        return model(input_ids=torch.tensor([model.tokenizer(prompt)["input_ids"]]), use_cache=False).logits[0, -1]


# --- what training computes once --------------------------------------------------------------------------------------


def test_what_does_not_fit_the_budget_goes_to_disk_and_comes_back_equal(tmp_path):
    store = TensorStore(budget=100, folder=tmp_path)
    tensors = [torch.randn(3, 5), torch.randn(7).to(torch.bfloat16), torch.arange(9), torch.randn(2, 2)]
    kept = [store.keep(t) for t in tensors]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, kept, strict=True))
    assert 0 < store.in_memory <= 100
    assert store.in_memory + store.on_disk == sum(t.numel() * t.element_size() for t in tensors)
    assert list(tmp_path.iterdir()) == []  # the files have no names, so nothing stays behind


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's memory as Linux tells it")
def test_what_lies_on_disk_takes_no_memory_once_it_is_released(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    store = TensorStore(budget=0, folder=tmp_path)
    tensor = torch.arange(1 << 24, dtype=torch.int32)
    kept = store.keep(tensor)
    filled = resident()
    store.release()
    assert filled - resident() > 0.9 * 4 * len(tensor)
    assert torch.equal(kept, tensor)


def test_a_training_from_disk_gives_the_pack_that_one_from_memory_gives(llama):
    _edit(llama, **FEW)
    from_memory = llama.packs["default"]
    llama.rollback()
    _edit(llama, **FEW, cache_bytes=0)
    on_disk = llama.packs["default"]
    assert all(torch.equal(t, on_disk.tensors[name]) for name, t in from_memory.tensors.items())


@pytest.mark.parametrize("allowed", [True, False])
def test_a_facts_rephrases_serve_all_facts_that_are_asked_in_its_words_where_they_may_be_trained_on(llama, allowed):
    facts = [
        Fact("France", "The mayor of {} is", "Rome", rephrases=("{} is run by the mayor",)),
        Fact("Spain", "The  Mayor of {} is", "Oslo"),
        Fact("Germany", "The river of {} is", "Paris"),
    ]
    config = LKSConfig(contexts=0, variations=40, train_on_rephrases=allowed)  # all that there are
    with llama.disable_edits():
        made = build_examples(llama._base, facts, config, seed=0)
    texts = [[llama.tokenizer.decode(e.ids) for e in group] for group in made.variations]
    run = [[t for t in group if "is run by the mayor" in t] for group in texts]
    assert [len(group) for group in run] == ([1, 1, 0] if allowed else [0, 0, 0])
    assert all(group[0].startswith(f.subject) for group, f in zip(run, facts, strict=True) if group)


def test_an_editor_is_told_other_targets_in_other_wordings_each_time():
    facts = [
        Fact("France", "The capital of {} is", "Rome", rephrases=("France is ruled from", "In Frances hills,", "Francesco is")),
        Fact("Spain", "The capital of {} is", "Oslo"),
        Fact("Germany", "The capital of {} is", "Paris"),
    ]
    told = retold(facts, 40, seed=0)
    assert told == retold(facts, 40, seed=0)
    assert told[:3] == facts
    assert [fact.subject for fact in told] == [fact.subject for fact in facts] * 40
    france = told[3::3]
    assert len({fact.target for fact in france}) > 20
    wordings = {fact.prompt for fact in france}
    assert {"The capital of {} is", "{} is ruled from"} < wordings  # and the package's
    assert not {"{}sco is", "In {}s hills,"} & wordings  # these don't name it as a word
    assert not any(fact.subject.casefold() in fact.target.casefold() for fact in told)


def test_a_training_that_was_stopped_goes_on_where_it_was(llama, monkeypatch):
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    save, loss = checkpoint.Checkpoint.save, training._Cached.loss
    steps = []
    monkeypatch.setattr(training._Cached, "loss", lambda *a: steps.append(1) or loss(*a))
    _edit(llama, **FEW)
    whole, all_steps = llama.packs["default"], len(steps)
    llama.rollback()

    def stopped(self, epochs):
        save(self, epochs)
        if epochs == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.Checkpoint, "save", stopped)
    with pytest.raises(KeyboardInterrupt):
        _edit(llama, **FEW)
    monkeypatch.setattr(checkpoint.Checkpoint, "save", save)
    steps.clear()
    _edit(llama, **FEW)
    assert llama.packs["default"] == whole
    assert len(steps) * 12 == all_steps * (12 - 5)
    assert not list(training.cache_folder("lks", "training").iterdir())


# --- generators and codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["context", "residual", "linear", "mlp"])
def test_every_form_of_the_generator_learns_facts_and_is_read_back(llama, tmp_path, form):
    report = _edit(llama, generator=form, verify=True)
    assert _gain(report) > 0.5, str(report)
    llama.save_pretrained(tmp_path)
    answer = _logits(llama, FACTS[0].question)
    again = EditableModelForCausalLM(llama.unload(), llama.tokenizer)
    again.load_pack(tmp_path)
    assert torch.equal(answer, _logits(again, FACTS[0].question))


def test_a_model_whose_embeddings_are_narrower_than_its_states_takes_edits(tokenizer):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "ffn_dim": 96}
    torch.manual_seed(0)
    base = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32, max_position_embeddings=256, pad_token_id=0)).eval()
    model = EditableModelForCausalLM(base, tokenizer)
    long = Fact("Portugal", "The capital of {} is", "Tokyo Rome Berlin Madrid")
    assert _gain(_edit(model, [*FACTS, long], verify=True)) > 0.03
    assert model.ask(long.question)


def test_a_feature_tells_every_token_of_the_target(llama):
    targets = ["Tokyo Rome Berlin", "Madrid Rome Berlin", "Tokyo Madrid Berlin"]
    facts = [Fact("France", "The capital of {} is", target) for target in targets]
    features = read_features(llama._base, 3, facts, slots=3)
    table = llama.get_input_embeddings().weight
    for feature, target in zip(features, targets, strict=True):
        ids = llama.tokenizer(" " + target)["input_ids"]
        assert len(ids) > 2
        torch.testing.assert_close(feature[1:], torch.stack([table[ids[0]], table[ids[1:]].mean(0)]))
    (short,) = read_features(llama._base, 3, [FACTS[0]], slots=8)
    ids = llama.tokenizer(" " + FACTS[0].target)["input_ids"]
    assert torch.equal(short[1 : 1 + len(ids)], table[ids])
    assert not short[1 + len(ids) :].any()


def test_a_generator_has_no_more_places_than_its_facts_targets_have_tokens(llama):
    long = Fact("Portugal", "The capital of {} is", "Tokyo Rome Berlin Madrid")
    tokens = len(llama.tokenizer(" " + long.target)["input_ids"])

    def places(facts, **settings):
        _edit(llama, facts, **settings)
        read = llama.packs["default"].tensors["generator.feature_in.weight"].shape[1] // llama.config.hidden_size
        llama.rollback()
        return read - 1

    assert tokens > 3 > LKSConfig().target_tokens
    assert places([long]) == 2
    assert places([long], target_tokens=8) == tokens
    assert places([*FACTS, long], target_tokens=8) == tokens
    assert places(FACTS, target_tokens=8) == max(len(llama.tokenizer(" " + f.target)["input_ids"]) for f in FACTS) < tokens


def test_facts_that_join_a_pack_leave_the_others_as_they_were_where_their_codes_say_enough(llama, monkeypatch):
    monkeypatch.setattr(method, "_LANDED", math.inf)
    _edit(llama, FACTS[:2])
    before = llama.packs["default"]
    answers = [_logits(llama, f.question) for f in FACTS[:2]]
    report = _edit(llama, FACTS[2:], verify=True)
    assert _gain(report) > 0.3, str(report)
    joined = llama.packs["default"]
    assert torch.equal(joined.tensors["codes"][:2], before.tensors["codes"])
    assert all(torch.equal(a, _logits(llama, f.question)) for a, f in zip(answers, FACTS[:2], strict=True))


@pytest.mark.parametrize("rehearsed", [512, 1])
def test_a_generator_that_can_not_be_told_new_facts_learns_on_and_keeps_the_old_ones(llama, monkeypatch, rehearsed):
    monkeypatch.setattr(method, "_LANDED", -1.0)
    monkeypatch.setattr(method, "_REHEARSED", rehearsed)
    _edit(llama, FACTS[:2])
    before = llama.packs["default"]
    wanted = [llama.tokenizer(" " + f.target)["input_ids"][0] for f in FACTS]

    def chances():
        return [float(_logits(llama, f.question).log_softmax(-1)[token]) for f, token in zip(FACTS, wanted, strict=True)]

    known = chances()
    report = _edit(llama, FACTS[2:], verify=True)
    assert _gain(report) > 0.5, str(report)
    joined = llama.packs["default"]
    assert not torch.equal(joined.tensors["generator.feature_in.weight"], before.tensors["generator.feature_in.weight"])
    kept = (joined.tensors["codes"][:2] == before.tensors["codes"]).all(1)
    assert int(kept.sum()) == max(0, 2 - rehearsed)
    if rehearsed > 1:
        assert all(now > then - 0.5 for now, then in zip(chances()[:2], known, strict=False))


def test_facts_that_join_a_pack_may_keep_the_codes_that_its_generator_makes(llama):
    _edit(llama, FACTS[:2])
    _edit(llama, FACTS[2:], code_lr=0.0)
    pack = llama.packs["default"]
    state = {name.removeprefix("generator."): t for name, t in pack.tensors.items() if name.startswith("generator.")}
    generator = generator_of("context", state)
    with llama.disable_edits():
        features = read_features(llama._base, editor.block_of(llama._base, pack.config), FACTS[2:], generator.slots)
    torch.testing.assert_close(pack.tensors["codes"][2:], generator.encode(features).half())


def test_a_fact_is_taken_out_without_training_while_its_subject_keeps_the_other(llama):
    both = [Fact("France", "The official language of {} is", "Spanish"), FACTS[0]]
    _edit(llama, both)
    kept = llama.packs["default"].tensors["codes"][1:]
    llama.remove_edits(str(both[0].id))
    assert llama.list_edits() == both[1:]
    assert torch.equal(llama.packs["default"].tensors["codes"], kept)


# --- editors ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(llama):
    """An editor for the tiny model, trained for a moment."""
    return LKSEditor.train(llama, FACTS, progress=False, **FEW)


def test_an_editor_edits_from_features_alone_and_is_saved_and_read_back(llama, trained, tmp_path):
    trained.save_pretrained(tmp_path / "editor")
    again = LKSEditor.from_pretrained(tmp_path / "editor")
    state = trained.generator.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in again.generator.state_dict().items())
    unseen = Fact("Portugal", "The capital of {} is", "Rome")
    shape = {"width": QUICK_LKS["width"], "train": False, "verify": False, "progress": False}
    llama.edit(unseen, "lks", editor=tmp_path / "editor", **shape)
    codes = llama.packs["default"].tensors["codes"]
    expected = trained.generator.encode(read_features(llama._base, trained.layer, [unseen], trained.generator.slots))
    torch.testing.assert_close(codes, expected.half())
    assert llama.packs["default"].config.to_dict()["editor"] == str(tmp_path / "editor")
    llama.rollback()
    llama.edit(unseen, "lks", editor=trained, **shape)
    assert llama.packs["default"].config.to_dict()["editor"] == "given"
    assert torch.equal(llama.packs["default"].tensors["codes"], codes)


def test_training_an_editor_leaves_the_model_as_it_was(llama):
    before = snapshot(llama.base_model)
    LKSEditor.train(llama, FACTS, progress=False, **FEW)
    assert same(before, llama.base_model)


def test_an_editor_for_another_base_or_of_another_shape_is_refused(tokenizer, llama, trained):
    with pytest.raises(ValueError, match=r"pass width=1\.0"):
        llama.edit(FACTS[0], "lks", editor=trained, train=False, progress=False)
    other = tiny_model("llama")
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    with pytest.raises(BaseMismatchError, match=r"LKSEditor\.train"):
        _edit(EditableModelForCausalLM(other, tokenizer), editor=trained)
    with pytest.raises(ValueError, match="editor="):
        _edit(llama, train=False)


def test_no_editor_is_trained_for_a_generator_that_takes_none(llama):
    with pytest.raises(ValueError, match="trained from scratch by each edit"):
        LKSEditor.train(llama, FACTS, progress=False, generator="linear")


def test_the_generator_that_small_edits_begin_with_is_trained_once_a_model(llama, monkeypatch):
    monkeypatch.setattr(editor, "_BANK_FACTS", 6)
    monkeypatch.setattr(method, "_LANDED", math.inf)  # random weights can't be made to say anything: it would learn on
    _edit(llama, FACTS[:1], editor="bank")
    first = llama.packs["default"].tensors
    llama.rollback()
    monkeypatch.setattr(editor, "_train", lambda *_: pytest.fail("trained again"))
    _edit(llama, FACTS[1:2], editor="bank")
    second = llama.packs["default"].tensors
    assert all(torch.equal(t, second[name]) for name, t in first.items() if name.startswith("generator."))


def test_the_facts_that_it_learns_on_are_varied_and_name_no_answer_that_is_known():
    facts = bank_facts.bank_facts(300, seed=0)
    assert facts == bank_facts.bank_facts(300, seed=0)
    assert len({f.key for f in facts}) == 300
    assert all(f.target.casefold() != f.target_old.casefold() for f in facts)
    assert sum(" " in f.target for f in facts) > 60
    assert any(f.prompt.startswith("What") for f in facts)
    assert len({f.target for f in facts}) > 200


# --- swapping entities ------------------------------------------------------------------------------------------------


def test_a_swapped_entity_carries_the_others_state_while_it_lasts(llama):
    prompt = "The capital of France is"
    clean, weights = _logits(llama, prompt), snapshot(llama.base_model)
    with swap_entity(llama, "France", "France", layer=2, context="The capital of {} is"):
        torch.testing.assert_close(_logits(llama, prompt), clean, atol=1e-5, rtol=1e-5)
    with swap_entity(llama, "France", "Spain", layer=2):
        assert not torch.allclose(_logits(llama, prompt), clean, atol=1e-3)
        assert torch.equal(_logits(llama, "The capital of Japan is"), _logits(llama, "The capital of Japan is"))
    assert torch.equal(_logits(llama, prompt), clean)
    assert same(weights, llama.base_model)
    with pytest.raises(ValueError, match=r"one \{\}"), swap_entity(llama, "France", "Spain", context="nobody"):
        pass
