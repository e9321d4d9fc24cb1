"""Edits outside of this library: as a LoRA adapter and as a plain model, loaded by processes that can't import it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import FACTS, QUICK_STEAM, tiny_model

from hf_edit import EditableModelForCausalLM, EditPack, MergeError

ARCHITECTURES = ("llama", "gpt2")  # gpt2 keeps its weights the other way round

# A process without hf_edit.
_OUTSIDE = """
import sys; sys.modules["hf_edit"] = None
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([json.loads(sys.argv[2])])).logits

load, found, folder = AutoModelForCausalLM.from_pretrained, {}, sys.argv[1]
for name in sys.argv[3:]:
    found[name, "plain transformers"] = logits(load(f"{folder}/{name}/adapter"))
    found[name, "PEFT"] = logits(PeftModel.from_pretrained(load(f"{folder}/{name}/base"), f"{folder}/{name}/adapter"))
    found[name, "merged"] = logits(load(f"{folder}/{name}/merged"))
torch.save(found, f"{folder}/found.pt")
"""


def _edited(folder, tokenizer, architecture="llama", method="steam", **quick):
    base = tiny_model(architecture)
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = EditableModelForCausalLM.from_pretrained(folder / "base")
    model.edit(FACTS, method, progress=False, verify=False, **quick)
    return model


@pytest.fixture(scope="module")
def outside(tokenizer, tmp_path_factory):
    """Logits of edited models here, and of what was exported of them elsewhere: {(architecture, how): logits}."""
    folder, found = tmp_path_factory.mktemp("outside"), {}
    ids = tokenizer(FACTS[0].question)["input_ids"]
    for name in ARCHITECTURES:
        model = _edited(folder / name, tokenizer, name, **{**QUICK_STEAM, "steps": 5})
        model.packs["default"].export_peft(folder / name / "adapter")
        with torch.no_grad():
            found[name, "edited"] = model(input_ids=torch.tensor([ids])).logits
            with model.disable_edits():
                found[name, "clean"] = model(input_ids=torch.tensor([ids])).logits
        model.merge_and_unload().save_pretrained(folder / name / "merged")
    command = [sys.executable, "-c", _OUTSIDE, str(folder), str(ids), *ARCHITECTURES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return {**found, **torch.load(folder / "found.pt")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", ["plain transformers", "PEFT"])
def test_an_exported_edit_is_a_lora_adapter_that_others_load(outside, architecture, how):
    edited, clean = outside[architecture, "edited"], outside[architecture, "clean"]
    assert (edited - clean).abs().max() > 1e-2
    torch.testing.assert_close(outside[architecture, how], edited, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_edit_is_a_plain_model(outside, architecture):
    torch.testing.assert_close(outside[architecture, "merged"], outside[architecture, "edited"], atol=1e-5, rtol=0)


def test_what_is_no_lora_says_so(world, tmp_path):
    with pytest.raises(MergeError, match="method='steam'"):
        EditPack.from_pretrained(world.folder / "lks").export_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_does_not_go_into_a_packs_folder(world, tmp_path):
    pack = world.copy(tmp_path)
    with pytest.raises(ValueError, match="folder of its own"):
        EditPack.from_pretrained(pack).export_peft(pack)
