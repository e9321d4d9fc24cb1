"""Packs on disk: what is written is what is read, and anything else is refused before a model is touched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, same, snapshot, tiny_model
from hostile import rehash

from hf_edit import BaseMismatchError, ConflictingEditsError, EditableModelForCausalLM, EditPack, PackFormatError

FILES = {"README.md", "edit_config.json", "edits.safetensors", "facts.jsonl"}


@pytest.fixture(params=["steam", "lks"])
def saved(request, tokenizer, tmp_path):
    """An edited model, its base saved in a folder, and its pack saved in another."""
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = EditableModelForCausalLM.from_pretrained(tmp_path / "base")
    quick = QUICK_STEAM if request.param == "steam" else QUICK_LKS
    model.edit(FACTS, request.param, progress=False, verify=False, **quick)
    model.save_pretrained(tmp_path / "pack")
    return model, tmp_path


def test_a_pack_has_its_four_files_with_ordinary_permissions(saved):
    _, folder = saved
    assert set(os.listdir(folder / "pack")) == FILES
    umask = os.umask(0)
    os.umask(umask)
    for name in FILES:
        assert stat.S_IMODE((folder / "pack" / name).stat().st_mode) == 0o666 & ~umask


def test_a_saved_pack_is_read_back_equal_and_gives_the_same_logits(saved):
    model, folder = saved
    assert EditPack.from_pretrained(folder / "pack") == model.packs["default"]
    again = EditableModelForCausalLM.from_pretrained(folder / "pack")
    assert again.list_edits() == FACTS
    ids = torch.tensor([model.tokenizer(FACTS[0].question)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_fresh_process_gives_the_same_logits(saved):
    model, folder = saved
    ids = model.tokenizer(FACTS[0].question)["input_ids"]
    code = (
        "import sys, torch\n"
        "from hf_edit import EditableModelForCausalLM\n"
        f"model = EditableModelForCausalLM.from_pretrained({str(folder / 'pack')!r})\n"
        f"torch.save(model(input_ids=torch.tensor([{ids}])).logits.detach(), {str(folder / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids])).logits
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, atol=1e-6, rtol=1e-6)


def test_inspecting_reads_no_tensor(saved, monkeypatch):
    _, folder = saved
    import hf_edit.pack

    monkeypatch.setattr(hf_edit.pack, "_read_tensors", lambda *_: pytest.fail("read the tensors"))
    found = EditPack.inspect(folder / "pack")
    assert found["num_facts"] == len(FACTS)
    assert found["tensors"]
    assert found["base_model_type"] == "llama"


def test_named_packs_go_to_subfolders_and_come_back(saved):
    model, folder = saved
    other = FACTS[0].replace(subject="Portugal")
    model.edit(other, "steam", pack_name="more", progress=False, verify=False, **QUICK_STEAM)
    model.save_pretrained(folder / "both")
    again = EditableModelForCausalLM.from_pretrained(folder / "both", base_model=folder / "base")
    assert again.active_packs == ["default", "more"]
    assert again.list_edits() == [*FACTS, other]


@pytest.mark.parametrize("change", ["weights", "size", "vocabulary", "tokenizer", "architecture"])
def test_another_base_is_refused_and_left_as_it_was(saved, tokenizer, bos_tokenizer, change):
    _, folder = saved
    base = tiny_model("qwen2" if change == "architecture" else "llama")
    if change == "weights":
        for parameter in base.parameters():
            parameter.data.mul_(1.1)
    if change == "size":
        base.config.num_hidden_layers = 5
        base.model.layers = base.model.layers[:5]
    if change == "vocabulary":
        base.resize_token_embeddings(1010, mean_resizing=False)
    model = EditableModelForCausalLM(base, bos_tokenizer if change == "tokenizer" else tokenizer)
    before = snapshot(base)
    with pytest.raises(BaseMismatchError, match=r"verify_base='warn'|has not the modules"):
        model.load_pack(folder / "pack")
    assert same(before, base)
    assert model.packs == {}


def test_the_check_of_the_base_can_be_a_warning(saved, tokenizer, caplog):
    _, folder = saved
    base = tiny_model("llama")
    base.lm_head.weight.data.mul_(1.0)
    for layer in base.model.layers:
        layer.mlp.down_proj.weight.data.mul_(1.01)
    model = EditableModelForCausalLM(base, tokenizer)
    model.load_pack(folder / "pack", verify_base="warn")
    assert "other weights" in caplog.text
    assert model.list_edits() == FACTS


def test_the_same_checkpoint_in_another_precision_is_the_same_base(saved, tokenizer):
    _, folder = saved
    model = EditableModelForCausalLM.from_pretrained(folder / "pack", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.list_edits() == FACTS


def test_loading_over_contradicting_facts_or_a_taken_name_is_refused(saved):
    model, folder = saved
    with pytest.raises(ConflictingEditsError, match="pack_name"):
        model.load_pack(folder / "pack")
    model.rollback()
    model.edit(FACTS[0].replace(target="Vienna"), pack_name="other", progress=False, verify=False, **QUICK_STEAM)
    with pytest.raises(ConflictingEditsError, match="two targets"):
        model.load_pack(folder / "pack")


@pytest.mark.parametrize("name", sorted(FILES - {"README.md"}))
def test_a_missing_file_is_named(saved, name):
    _, folder = saved
    (folder / "pack" / name).unlink()
    with pytest.raises((FileNotFoundError, PackFormatError), match=name.replace(".", r"\.")):
        EditPack.from_pretrained(folder / "pack")


@pytest.mark.parametrize("name", ["edits.safetensors", "facts.jsonl"])
def test_one_changed_byte_is_refused(saved, name):
    _, folder = saved
    path = folder / "pack" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackFormatError, match="hash"):
        EditPack.from_pretrained(folder / "pack")


def test_the_card_may_be_changed_by_anyone(saved):
    model, folder = saved
    (folder / "pack" / "README.md").write_text("mine")
    assert EditPack.from_pretrained(folder / "pack") == model.packs["default"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "upgrade"),
        (lambda c: c.update(method="os.system"), "no method"),
        (lambda c: c.update(extra=1), "unknown keys: extra"),
        (lambda c: c.pop("seed"), "no 'seed'"),
        (lambda c: c.update(num_facts="4"), "wrong type"),
        (lambda c: c.update(num_facts=3), "says 3"),
        (lambda c: c["method_config"].update(nonsense=1), "no setting 'nonsense'"),
        (lambda c: c.update(modules=["model.layers.0.mlp.up_proj"]), "tensors do not match|other weights"),
    ],
)
def test_a_wrong_configuration_is_refused_with_the_reason(saved, change, message):
    model, folder = saved
    rehash(folder / "pack", change)
    model.rollback()
    before = snapshot(model.base_model)
    with pytest.raises((PackFormatError, BaseMismatchError), match=message):
        model.load_pack(folder / "pack")
    assert same(before, model.base_model)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}', '{"a": NaN}', "\ufeff{}", "[" * 3000, "9" * 5000])
def test_what_is_no_plain_json_object_is_refused(saved, text):
    _, folder = saved
    (folder / "pack" / "edit_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(PackFormatError):
        EditPack.from_pretrained(folder / "pack")


def test_an_incomplete_folder_is_not_taken_for_a_model(saved):
    _, folder = saved
    (folder / "pack" / "edit_config.json").unlink()
    with pytest.raises(PackFormatError, match="incomplete"):
        EditableModelForCausalLM.from_pretrained(folder / "pack")


def test_saving_over_a_pack_replaces_it(saved):
    model, folder = saved
    model.remove_edits(str(FACTS[0].id))
    model.save_pretrained(folder / "pack")
    assert list(EditPack.from_pretrained(folder / "pack").facts) == FACTS[1:]
    assert set(os.listdir(folder / "pack")) == FILES


def test_nothing_to_save_is_an_error(llama, tmp_path):
    with pytest.raises(ValueError, match="edit"):
        llama.save_pretrained(tmp_path / "pack")


def test_a_model_folder_with_a_pack_below_it_is_a_model(saved):
    model, folder = saved
    model.save_pretrained(folder / "base" / "mine")
    assert EditableModelForCausalLM.from_pretrained(folder / "base").list_edits() == []


def test_a_pack_finds_its_base_from_any_working_directory(saved, monkeypatch, tmp_path):
    _, folder = saved
    monkeypatch.chdir(folder)
    model = EditableModelForCausalLM.from_pretrained("./base")
    model.edit(FACTS[0], "rome", progress=False, verify=False, **QUICK_STEAM)
    model.save_pretrained("relative")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert EditableModelForCausalLM.from_pretrained("../relative").list_edits() == [FACTS[0]]
