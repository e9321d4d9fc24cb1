"""Edits of a model on an accelerator, which is only pretended here: they run, and their results equal the CPU's."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from accelerate import dispatch_model
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, VOCABULARY, same, snapshot, tiny_model
from pretended_device import pretended_devices

from hf_edit import EditableModelForCausalLM, KeyStatistics, LKSEditor
from hf_edit.analysis import residual_flow
from hf_edit.layout import find_layout
from hf_edit.methods.lks import swap_entity
from hf_edit.methods.steam import anchors

CPU, ACCELERATOR, SPLIT = "cpu", "cuda:0", "cuda:0 and cuda:1"
STEAM = {**QUICK_STEAM, "layers": (1, 2), "steps": 4, "contexts": 2, "context_length": 4, "min_references": 1}
LKS = {**QUICK_LKS, "min_steps": 8, "compute_dtype": "model"}
ANCHORED = {**STEAM, "anchor_weight": 4.0, "max_references": 4}
EDITS = {
    "STEAM, a batch": (FACTS[:2], "steam", ANCHORED),
    "STEAM, one fact": (FACTS[:1], "steam", ANCHORED),
    "STEAM with a gate": (FACTS[:2], "steam", {**STEAM, "gate": True}),
    "ROME": (FACTS[:2], "rome", STEAM),
    "MEMIT": (FACTS[:2], "memit", STEAM),
    "AlphaEdit": (FACTS[:2], "alphaedit", {**STEAM, "null_space_threshold": 0.5}),
    "LKS": (FACTS[:2], "lks", LKS),
    "LKS with a gate": (FACTS[:2], "lks", {**LKS, "gate": True}),
}
ASKED = [
    FACTS[0].replace(
        target_old="Paris",
        rephrases=("The seat of government of {} is",),
        locality=({"prompt": "The capital of Italy is", "target": "Paris"}, "The language of France is"),
        portability=({"prompt": "The mayor of the capital of France works in", "target": "Tokyo"},),
    ),
    FACTS[1],
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """A cache for each device, so that neither reads what the other computed."""
    return {device: tmp_path_factory.mktemp("cache") for device in (CPU, ACCELERATOR, SPLIT)}


@pytest.fixture(autouse=True)
def comparable(monkeypatch, quick_gate):
    """No autocast, which pretended accelerators lack; and every reference counts as recalled, so that there are anchors."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(anchors, "_NEAR", VOCABULARY)


@pytest.fixture
def on_both(caches, monkeypatch, tokenizer):
    """Calls a function with a model on the CPU and with one on the accelerator, or on two; returns both results."""

    def run(function, architecture="llama", where=ACCELERATOR):
        results = []
        for device in (CPU, where):
            monkeypatch.setenv("HF_EDIT_CACHE", str(caches[device]))
            with nullcontext() if device == CPU else pretended_devices():
                base = tiny_model(architecture)
                model = EditableModelForCausalLM(split(base) if device == SPLIT else base.to(device), tokenizer)
                devices, before = devices_of(model), snapshot(model.base_model)
                assert {str(one) for one in devices} == set(device.split(" and "))
                results.append(function(model))
                assert devices_of(model) == devices
                model.rollback()
                assert devices_of(model) == devices
                assert same(before, model.base_model)
        return results

    return run


def split(model):
    """The model with the first half of its blocks on one accelerator, and the rest on another."""
    layout = find_layout(model)
    decoder = layout.blocks_path.rpartition(".")[0]
    places = {name: "cuda:1" for name, _ in model.named_children()}
    del places[decoder.partition(".")[0]]
    for name, _ in layout.decoder.named_children():
        places[f"{decoder}.{name}"] = "cuda:1" if "norm" in name or name == "ln_f" else "cuda:0"
    del places[layout.blocks_path]
    half = len(layout) // 2
    places |= {f"{layout.blocks_path}.{n}": "cuda:0" if n < half else "cuda:1" for n in range(len(layout))}
    return dispatch_model(model, places, main_device="cuda:0", force_hooks=True)


def devices_of(model):
    """The devices of all parameters and buffers."""
    return {tensor.device for tensor in (*model.parameters(), *model.buffers())}


def logits(model):
    """The logits of all facts' prompts, on the CPU."""
    rows = model.tokenizer([f.question for f in FACTS], return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        return model(**rows.to(model.device)).logits.cpu()


def untimed(report):
    """A report without its times."""
    return {key: value for key, value in report.to_dict().items() if not key.startswith("seconds")}


def assert_alike(one, other):
    """Assert that results are equal, numbers up to rounding: batches on accelerators are larger."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_alike(a, b)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-4)
    else:
        assert one == (pytest.approx(other, rel=1e-3) if isinstance(other, float) else other)


@pytest.mark.parametrize(
    ("where", "architecture", "edit"),
    [
        *((ACCELERATOR, "llama", edit) for edit in EDITS),
        *((ACCELERATOR, name, "STEAM, a batch") for name in ("bloom", "gemma3", "gpt2", "gptj", "mistral", "olmo2", "qwen2")),
        *((ACCELERATOR, name, "LKS") for name in ("gemma3", "gpt2")),
        *((SPLIT, "llama", edit) for edit in ("STEAM, a batch", "STEAM with a gate", "AlphaEdit", "LKS", "LKS with a gate")),
        *((SPLIT, name, edit) for name in ("gemma3", "gpt2", "qwen2") for edit in ("STEAM, a batch", "LKS")),
    ],
)
def test_an_edit_on_accelerators_equals_the_one_on_the_cpu(on_both, where, architecture, edit):
    facts, method, settings = EDITS[edit]

    def made(model):
        clean = logits(model)
        report = model.edit(facts, method, progress=False, **settings)
        assert (logits(model) - clean).abs().max() > 1e-2
        assert all(r.note.endswith(" references") == (settings is ANCHORED) for r in report)
        return untimed(report), model.packs["default"].fit.tensors, logits(model)

    assert_alike(*on_both(made, architecture, where))


METHODS = {
    "STEAM": ("steam", STEAM),
    "STEAM with a gate": ("steam", {**STEAM, "gate": True}),
    "MEMIT": ("memit", STEAM),
    "LKS": ("lks", LKS),
}


@pytest.mark.parametrize("where", [ACCELERATOR, SPLIT])
@pytest.mark.parametrize("name", METHODS)
def test_facts_are_added_evaluated_saved_and_removed_on_accelerators_as_on_the_cpu(on_both, tokenizer, tmp_path, name, where):
    method, settings = METHODS[name]
    quick = {"progress": False, "verify": False}

    def steps(model):
        clean, device, found = logits(model), model.device, []
        model.edit(FACTS[3], "rome", pack_name="earlier", **STEAM, **quick)
        model.edit(ASKED, method, **settings, **quick)
        model.edit(FACTS[2], method, **settings, **quick)  # joins the pack
        found += [untimed(model.evaluate(mode="both", max_new_tokens=8, progress=False)), logits(model)]
        with model.disable_edits():
            assert torch.equal(logits(model), clean)
        folder, base = tmp_path / device.type, tiny_model("llama")
        base = split(base) if len(devices_of(model)) > 1 else base.to(device)
        model.save_pretrained(folder)
        again = EditableModelForCausalLM.from_pretrained(folder, base_model=base, tokenizer=tokenizer)
        torch.testing.assert_close(logits(again), logits(model))
        model.remove_edits(ASKED[0].id, progress=False)
        return [*found, logits(model), model.ask([f.question for f in FACTS])]

    assert_alike(*on_both(steps, where=where))


def test_a_model_in_half_precision_is_edited_on_an_accelerator(tokenizer):
    with pretended_devices():
        model = EditableModelForCausalLM(tiny_model("llama").to(ACCELERATOR, torch.bfloat16), tokenizer)
        clean = logits(model)
        model.edit(FACTS[:2], progress=False, verify=False, **STEAM)
        assert (logits(model) - clean).abs().max() > 1e-2
        model.rollback()
        assert torch.equal(logits(model), clean)


def test_an_edited_model_can_be_moved_to_an_accelerator_and_back(llama):
    with pretended_devices():
        llama.edit(FACTS[0], "rome", progress=False, verify=False, **STEAM)
        edited = logits(llama)
        for device in (ACCELERATOR, "cuda:1", CPU):
            llama.to(device)
            for model in (llama, copy.deepcopy(llama)):
                assert devices_of(model) == {torch.device(device)}
                torch.testing.assert_close(logits(model), edited)


def test_statistics_editors_analysis_and_entity_swap_on_an_accelerator_equal_the_cpu(on_both):
    def made(model):
        statistics = KeyStatistics.compute(model, texts=[f.question for f in FACTS], resume=False, progress=False)
        editor = LKSEditor.train(model, FACTS, progress=False, **{**LKS, "epochs": 2, "min_steps": 1})
        model.edit(FACTS[0], "lks", editor=editor, train=False, gate=False, progress=False, verify=False, **editor.settings)
        flow = residual_flow(model, FACTS[:1], others=2)
        with swap_entity(model, "Spain", "Japan"):
            swapped = logits(model)
        moments = [moment.matrix for moment in statistics.moments.values()]
        return moments, editor.generator.state_dict(), flow.to_dict(), swapped

    assert_alike(*on_both(made))


MIXED = {
    "sums": lambda on, off: on + off,
    "products of matrices": lambda on, off: off @ on,
    "rows to concatenate, though there are none": lambda on, off: torch.cat([off[:0], on]),
    "indices of the accelerator elsewhere": lambda on, off: off[on.argmax(1)],
    "rows that are written at indices": lambda on, off: on.index_put((torch.tensor([0]),), off[:1]),
    "indices to gather at": lambda on, off: on.gather(1, off.argsort(1)),
    "embeddings of ids": lambda on, off: torch.nn.functional.embedding(off.argmax(1), on),
    "results elsewhere": lambda on, off: off[0, 0].add_(on[0, 0]),
}


@pytest.mark.parametrize("elsewhere", [CPU, "cuda:1"])
@pytest.mark.parametrize("mixed", MIXED)
def test_a_pretended_accelerator_refuses_what_mixes_devices(mixed, elsewhere):
    with pretended_devices():
        on, off = torch.eye(4, device=ACCELERATOR), torch.eye(4, device=elsewhere)
        MIXED[mixed](on, on)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            MIXED[mixed](on, off)


def test_a_pretended_accelerator_takes_numbers_and_indices_from_the_cpu_as_real_ones_do():
    with pretended_devices():
        on, off, rows = torch.eye(4, device=ACCELERATOR), torch.eye(4), torch.tensor([0, 1])
        made = [
            on * torch.tensor(2.0),
            torch.where(on > 0, on, torch.tensor(0.5)),
            on.masked_fill(on > 0, torch.tensor(0.5)),
            on[rows],
            on[off > 0],
            on.index_put((rows,), torch.tensor(0.5)),
            on.clone().copy_(off),
        ]
        assert {tensor.device for tensor in made} == {torch.device(ACCELERATOR)}
        assert off.clone().copy_(on).device == torch.device(CPU)


def test_tensors_stay_on_a_pretended_accelerator_until_they_are_moved():
    with pretended_devices():
        on, off = torch.eye(4, device="cuda"), torch.eye(4, requires_grad=True)
        made = [on[1:].T, on.new_zeros(2), torch.zeros_like(off, device=on.device), off.to(on), off.cuda(), copy.deepcopy(on)]
        assert {tensor.device for tensor in made} == {on.device} == {torch.device(ACCELERATOR)}
        assert {t.device for t in (off, on.cpu(), on.new_zeros(2, device=CPU), torch.as_tensor(on, device=CPU))} == {off.device}
        with pytest.raises(TypeError, match="numpy"):
            on.numpy()
        (off.to(on) * 2).sum().backward()
        assert off.grad.device == off.device
        assert off.grad.tolist() == [[2.0] * 4] * 4
