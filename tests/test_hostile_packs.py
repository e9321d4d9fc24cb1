"""Packs are data from strangers: what is wrong with one is said exactly, before the model is touched."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import unicodedata

import pytest
import torch
from conftest import FACTS, same, snapshot, tiny_model
from hostile import rehash, rewrite, safetensors

from hf_edit import (
    BaseMismatchError,
    ConflictingEditsError,
    EditableModelForCausalLM,
    EditPack,
    PackFormatError,
    PackSecurityError,
)
from hf_edit.share import PackFolder

NAMES = ("edit_config.json", "edits.safetensors", "facts.jsonl")


@pytest.fixture
def pack(world, tmp_path):
    """A STEAM pack of one's own."""
    return world.copy(tmp_path)


@pytest.fixture
def lks_pack(world, tmp_path):
    return world.copy(tmp_path, "lks")


def test_a_pack_that_nobody_touched_loads(world, pack):
    world.takes(pack)
    world.takes(rehash(pack))


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file(world, pack, name):
    (pack / name).unlink()
    world.refuses(pack, PackFormatError, "incomplete")


def test_a_folder_without_a_configuration_is_no_pack_however_it_is_read(world, pack, tmp_path):
    (pack / "edit_config.json").unlink()
    (tmp_path / "empty").mkdir()
    for folder in (pack, tmp_path / "empty"):
        for read in (
            EditPack.from_pretrained,
            EditPack.inspect,
            EditableModelForCausalLM.from_pretrained,
            lambda folder: EditableModelForCausalLM.from_pretrained(folder, base_model=world.folder / "base"),
            world.model.load_pack,
            PackFolder,
            lambda folder: EditPack.from_pretrained(folder.parent, pack_name=folder.name),
        ):
            with pytest.raises(PackFormatError, match=r"edit_config\.json|holds no edit pack"):
                read(folder)


@pytest.mark.parametrize("name", [".incoming", ".incoming-0123456789abcdef0123456789abcdef", ".saving-x"])
def test_what_lies_in_dot_folders_never_takes_the_place_of_a_pack(world, tmp_path, name):
    """Neither in a pack nor beside it: what is loaded is what inspecting shows and what stands in the pack's own files."""
    pack = world.copy(tmp_path)
    other = shutil.copytree(world.folder / "lks", tmp_path / "other")
    shutil.copytree(other, pack / name)
    (tmp_path / name).mkdir()
    shutil.copytree(other, tmp_path / name / "pack")
    (tmp_path / name / "precious.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert EditPack.inspect(pack)["method"] == EditPack.from_pretrained(pack).method == "steam"
    assert EditableModelForCausalLM.from_pretrained(pack).packs["default"].method == "steam"
    EditPack.from_pretrained(pack).save_pretrained(pack)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.parent != pack} == {
        path: content for path, content in before.items() if path.parent != pack
    }


def test_a_card_that_is_a_link_is_not_shared(world, pack, tmp_path):
    (tmp_path / "token").write_text("hf_secret")
    (tmp_path / "upload").mkdir()
    for content in (tmp_path / "token", "nowhere"):
        (pack / "README.md").unlink()
        (pack / "README.md").symlink_to(content)
        with pytest.raises((PackSecurityError, PackFormatError), match=r"README\.md is a link"):
            PackFolder(pack)._write_for_hub(tmp_path / "upload", "me/lyon")
    assert not any((tmp_path / "upload").iterdir())
    (pack / "README.md").unlink()
    os.mkfifo(pack / "README.md")
    with pytest.raises(PackFormatError, match="no regular file"):
        PackFolder(pack)._write_for_hub(tmp_path / "upload", "me/lyon")


@pytest.mark.parametrize("name", ["default", "a:b", "x" * 65])
def test_a_subfolder_whose_name_no_pack_may_have_is_refused_however_it_is_read(world, pack, name):
    """Also "default", which is the pack in the folder itself: it would be loaded, and inspecting would not show it."""
    for own in (True, False):
        shutil.copytree(world.folder / "lks", pack / name)
        for read in (EditPack.inspect, EditableModelForCausalLM.from_pretrained, PackFolder):
            with pytest.raises(PackFormatError, match="rename the folder"):
                read(pack)
        shutil.rmtree(pack / name)
        if own:
            for path in pack.iterdir():
                path.unlink()


def test_inspecting_refuses_a_configuration_that_was_changed(world, pack):
    path = pack / "edit_config.json"
    path.write_text(path.read_text().replace('"num_facts": 4', '"num_facts": 999'))
    for read in (EditPack.inspect, EditPack.from_pretrained):
        with pytest.raises(PackFormatError, match=r"hash differs|999"):
            read(pack)


def test_a_folder_of_packs_names_them_where_it_has_none_of_its_own(world, tmp_path):
    shutil.copytree(world.folder / "lks", tmp_path / "packs" / "lyon")
    with pytest.raises(PackFormatError, match=r"there are packs in it: lyon"):
        EditPack.from_pretrained(tmp_path / "packs")


def test_packs_that_load_along_with_one_are_named_when_it_is_inspected(world, pack):
    shutil.copytree(world.folder / "lks", pack / "more")
    shutil.copytree(world.folder / "lks", pack / ".hidden")
    assert EditPack.inspect(pack)["other_packs"] == ["more"]
    assert EditPack.inspect(pack, pack_name="more")["other_packs"] == ["default"]
    (pack / "edit_config.json").unlink()
    (pack / "edits.safetensors").unlink()
    assert list(EditableModelForCausalLM.from_pretrained(pack).packs) == ["more"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_in_a_files_place(world, pack, name):
    (pack / name).unlink()
    (pack / name).mkdir()
    world.refuses(pack, PackFormatError, "no regular file")


@pytest.mark.parametrize("name", NAMES)
def test_a_fifo_in_a_files_place_is_not_waited_for(world, pack, name):
    (pack / name).unlink()
    os.mkfifo(pack / name)
    world.refuses(pack, PackFormatError, "no regular file")


@pytest.mark.parametrize("name", NAMES)
def test_a_link_out_of_the_pack(world, pack, tmp_path, name):
    shutil.move(pack / name, tmp_path / name)
    (pack / name).symlink_to(tmp_path / name)
    world.refuses(pack, PackSecurityError, "link out of the pack")


def test_a_link_to_nothing_and_a_link_to_itself(world, pack):
    for target in ("nowhere", "facts.jsonl"):
        (pack / "facts.jsonl").unlink()
        (pack / "facts.jsonl").symlink_to(target)
        world.refuses(pack, PackFormatError, "link to nothing")


def test_links_within_the_pack_and_into_the_hubs_cache_are_followed(world, pack, tmp_path):
    (pack / "facts.jsonl").rename(pack / "kept")
    (pack / "facts.jsonl").symlink_to("kept")
    world.takes(pack)
    repo = tmp_path / "models--me--mine"
    snapshot_folder = repo / "snapshots" / ("0" * 40)
    shutil.copytree(world.folder / "steam", snapshot_folder)
    (repo / "blobs").mkdir()
    (snapshot_folder / "facts.jsonl").rename(repo / "blobs" / "abc")
    (snapshot_folder / "facts.jsonl").symlink_to("../../blobs/abc")
    world.takes(snapshot_folder)
    (snapshot_folder / "facts.jsonl").unlink()
    (snapshot_folder / "facts.jsonl").symlink_to("../../../pack/kept")
    world.refuses(snapshot_folder, PackSecurityError, "link out of the pack")


def test_a_link_in_a_subfolders_place(world, pack, tmp_path):
    shutil.copytree(world.folder / "lks", tmp_path / "elsewhere")
    (pack / "more").symlink_to(tmp_path / "elsewhere")
    for read in (
        EditableModelForCausalLM.from_pretrained,
        EditPack.inspect,
        PackFolder,
        lambda folder: EditPack.from_pretrained(folder, pack_name="more"),
        lambda folder: EditPack.inspect(folder, pack_name="more"),
    ):
        with pytest.raises(PackSecurityError, match="is a link"):
            read(pack)


def test_a_file_where_a_folder_is_expected(world, pack):
    world.refuses(pack / "facts.jsonl", FileNotFoundError, "no folder")
    with pytest.raises(NotADirectoryError, match="is a file"):
        EditPack.from_pretrained(pack).save_pretrained(pack / "facts.jsonl")


def test_pickles_beside_the_pack_are_never_opened(world, pack, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'exploded'}",)

    for name in ("pytorch_model.bin", "edits.pt", "edits.bin", "adapter_model.bin", "training_args.bin"):
        (pack / name).write_bytes(pickle.dumps(Bomb()))
    world.takes(pack)
    (pack / "edits.safetensors").write_bytes(pickle.dumps(Bomb()))
    world.refuses(rehash(pack), PackFormatError, "safetensors")
    assert not (tmp_path / "exploded").exists()


# --- edit_config.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"seed": NaN}', "NaN is no JSON"),
        (b'{"seed": 1e999}', "too large a number"),
        (b'{"seed": 1, "seed": 2}', "stands twice"),
        (b"[" * 3000, "not valid JSON"),
        (b'{"a":' * 3000, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * 100_000_000, "more than the 1048576"),
    ],
    ids=["empty", "cut", "list", "utf16", "bom", "nan", "inf", "twice", "deep-list", "deep-object", "digits", "100MB"],
)
def test_a_configuration_that_is_no_plain_json_object(world, pack, data, match):
    (pack / "edit_config.json").write_bytes(data)
    world.refuses(pack, PackFormatError, match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format_version", 2, "pip install --upgrade"),
        ("format_version", 0, "none before 1"),
        ("format_version", True, "wrong type"),
        ("format_version", "1", "wrong type"),
        ("method", "os.system", "no method 'os.system'"),
        ("method", "../x", "no method"),
        ("method", "Steam", "no method 'Steam'"),
        ("method", "", "no method"),
        ("method", ["steam"], "wrong type"),
        ("extra", 1, "unknown keys: extra"),
        ("trust_remote_code", True, "unknown keys"),
        ("num_facts", 0, "num_facts"),
        ("num_facts", -4, "num_facts"),
        ("num_facts", 1_000_000, "num_facts"),
        ("num_facts", 4.0, "wrong type"),
        ("seed", 1 << 70, "seed"),
        ("sizes", {"hidden_size": 48}, "sizes"),
        ("sizes", {"hidden_size": -1, "num_hidden_layers": 6, "vocab_size": 1000}, "sizes"),
        ("versions", {"torch": 1}, "versions"),
        ("facts_sha256", "0" * 63, "facts_sha256"),
        ("tensors_sha256", "../../etc/passwd", "tensors_sha256"),
        ("parent", "the one before", "parent"),
        ("base_fingerprint", "", "base_fingerprint"),
        ("modules", [], "modules"),
        ("modules", [1], "modules"),
        ("modules", [""], "modules"),
        ("modules", "model", "wrong type"),
        ("modules", ["a"] * 2, "modules"),
    ],
)
def test_a_key_of_a_wrong_kind_or_out_of_range(world, pack, key, value, match):
    world.refuses(rehash(pack, lambda config: config.update({key: value})), PackFormatError, match)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"nonsense": 1}, "no setting 'nonsense'"),
        ({"steps": "60"}, "steps must be int"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"base_editor": "os.system"}, "base_editor is one of"),
    ],
)
def test_a_setting_that_is_none(world, pack, settings, match):
    world.refuses(rehash(pack, lambda config: config["method_config"].update(settings)), PackFormatError, match)


def test_a_configuration_that_was_changed_by_hand(world, pack):
    path = pack / "edit_config.json"
    config = json.loads(path.read_text())
    config["seed"] += 1
    path.write_text(json.dumps(config))
    world.refuses(pack, PackFormatError, "was changed since the pack was saved")


@pytest.mark.parametrize("name", ["a\nb", "a\x00b", "\x1b[2J", "", "  ", "a\u202eb"])
def test_a_base_name_with_a_control_character_or_none(world, pack, name):
    pack = rehash(pack, lambda config: config.update(base_model_name_or_path=name))
    world.refuses(pack, PackSecurityError, "base model's name")
    with pytest.raises(PackSecurityError):
        EditableModelForCausalLM.from_pretrained(pack)


@pytest.mark.parametrize("revision", ["main", "0" * 39 + "G", "0" * 39, "", "refs/pr/1", "A" * 40])
def test_a_revision_that_is_no_full_sha(world, pack, revision):
    pack = rehash(pack, lambda config: config.update(base_model_revision=revision))
    world.refuses(pack, PackSecurityError, "no full sha")


# --- the base ---------------------------------------------------------------------------------------------------------


def test_weights_that_are_offloaded_are_still_compared(world, pack, tokenizer):
    from accelerate import cpu_offload

    base = tiny_model("llama")
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.model.layers[1].mlp.down_proj.weight.is_meta
    model = EditableModelForCausalLM(base, tokenizer)
    model.load_pack(pack)
    world.model.load_pack(pack)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, world.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    world.model.rollback()


def test_weights_that_are_not_there_are_not_compared(pack, tokenizer):
    base = tiny_model("llama")
    base.model.layers.to("meta")
    with pytest.raises(BaseMismatchError, match="are not loaded"):
        EditableModelForCausalLM(base, tokenizer).load_pack(pack)


def test_a_base_whose_modules_are_of_another_class(world, pack, tokenizer):
    """As quantised ones are: the same name and shape, other parameters."""

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.register_buffer("codes", linear.weight.data.to(torch.int8))

    base = tiny_model("llama")
    for layer in base.model.layers:
        layer.mlp.down_proj = Packed(layer.mlp.down_proj)
    with pytest.raises(BaseMismatchError, match="base_fingerprint"):
        EditableModelForCausalLM(base, tokenizer).load_pack(pack)


# --- edits.safetensors ------------------------------------------------------------------------------------------------

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "past its end"),
        (b"\x10\0\0", "past its end"),
        (safetensors({"a": ENTRY}, EIGHT)[:-1], "its header describes"),
        (safetensors({"a": ENTRY}, EIGHT + b"x"), "its header describes"),
        (safetensors({"a": ENTRY}, EIGHT, length=1 << 40), "past its end"),
        (safetensors({"a": ENTRY}, EIGHT, length=(1 << 64) - 1), "past its end"),
        (safetensors(b" " * (5 << 20)), "more than any edit pack's"),
        (safetensors([ENTRY]), "no JSON object"),
        (safetensors(b"{" * 5000), "not valid JSON"),
        (safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{}}'), "stands twice"),
        (safetensors({"a": {**ENTRY, "data_offsets": [8, 16]}}, EIGHT * 2), "a hole"),
        (safetensors({"a": ENTRY, "b": ENTRY}, EIGHT), "an overlap"),
        (safetensors({"a": {**ENTRY, "data_offsets": [-8, 0]}}), "uneven place"),
        (safetensors({"a": {**ENTRY, "data_offsets": [8, 0]}}, EIGHT), "another size than its shape"),
        (safetensors({"a": {**ENTRY, "shape": [1 << 62, 4]}}, EIGHT), "empty or huge"),
        (safetensors({"a": {**ENTRY, "shape": [0, 1 << 62], "data_offsets": [0, 0]}}), "empty or huge"),
        (safetensors({"a": {**ENTRY, "shape": [-2]}}, EIGHT), "empty or huge"),
        (safetensors({"a": {**ENTRY, "shape": [2.0]}}, EIGHT), "no proper shape"),
        (safetensors({"a": {**ENTRY, "shape": []}}, EIGHT), "no proper shape"),
        (safetensors({"a": {**ENTRY, "dtype": "F64"}}, EIGHT), "which no edit pack holds"),
        (safetensors({"a": {**ENTRY, "dtype": "OBJECT"}}, EIGHT), "which no edit pack holds"),
        (safetensors({"a": {**ENTRY, "more": 1}}, EIGHT), "not described"),
        (safetensors({"a": 1}, EIGHT), "not described"),
        (safetensors({"__metadata__": {"format": 1}, "a": ENTRY}, EIGHT), "metadata"),
        (safetensors({"a": ENTRY}, EIGHT), "does not say so"),
        (b"PK\x03\x04" + b"\0" * 100, "past its end"),
        (safetensors({f"t{i}": {**ENTRY, "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}), "20000 tensors"),
        (safetensors({f"{i}": {} for i in range(200_000)}), "200000 tensors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malformed_tensor_file(world, pack, data, match):
    (pack / "edits.safetensors").write_bytes(data)
    world.refuses(rehash(pack), PackFormatError, match)
    if "does not say so" not in match:
        with pytest.raises(PackFormatError):
            EditPack.inspect(pack)


def _each(change):
    def apply(tensors, name=None):
        name = name or next(n for n in sorted(tensors) if tensors[n].dim() == 2 and len(set(tensors[n].shape)) == 2)
        tensors[name] = change(tensors[name])

    return apply


_WRONG = pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda tensors, name=None: tensors.pop(name or sorted(tensors)[0]), "tensors|needs a"),
        (lambda tensors, name=None: tensors.update(extra=torch.zeros(1)), "tensors"),
        (_each(lambda t: t.to(torch.bfloat16)), "float32|dtype|matri|tensors|int64"),
        (_each(lambda t: t.reshape(-1)), "matri|shape|tensors|int64"),
        (_each(lambda t: t.reshape(-1)[:1].clone()), "matri|shape|tensors|int64"),
        (_each(lambda t: t.mT.contiguous()), "facts|matri|shape|tensors|int64"),
        (_each(lambda t: t[..., :-1].contiguous()), "facts|matri|shape|tensors|codes|int64"),
        (_each(lambda t: t * float("nan")), "NaN or infinity"),
        (_each(lambda t: t.float().index_fill(0, torch.tensor([0]), float("inf"))), "NaN or infinity"),
        (_each(lambda t: torch.full_like(t.float(), 1e30)), "out of any scale"),
        (_each(lambda t: torch.full_like(t.float(), -1e30)), "out of any scale"),
    ],
    ids=["missing", "extra", "dtype", "rank", "one-element", "transposed", "short", "nan", "inf", "1e30", "-1e30"],
)


@_WRONG
@pytest.mark.parametrize("method", ["steam", "lks"])
def test_tensors_that_are_not_the_methods(world, tmp_path, method, change, match):
    world.refuses(rewrite(world.copy(tmp_path, method), tensors=change), PackFormatError, match)


@_WRONG
@pytest.mark.parametrize("name", ["values", "edits", "model.layers.1.mlp.down_proj.left"])
def test_of_a_weight_edit_each_kind_of_tensor(world, pack, name, change, match):
    world.refuses(rewrite(pack, tensors=lambda tensors: change(tensors, name)), PackFormatError, match)


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        ("values", torch.zeros(3, 1, 48), "values must be float32"),
        ("values", torch.zeros(4, 3, 48), "values must be float32"),  # more than there are layers
        ("values", torch.zeros(4, 1, 96), "values must be float32"),
        ("edits", torch.tensor([[4, 0, 2, 0]]), "edits must be int64"),
        ("edits", torch.tensor([[1, 0, 2]] * 5), "edits must be int64"),
        ("edits", torch.tensor([[3, 0, 2]]), "not of 4 facts"),
        ("edits", torch.tensor([[4, 0, 2], [0, 0, 2]]), "not of 4 facts"),
        ("edits", torch.tensor([[5, 0, 2], [-1, 0, 2]]), "not of 4 facts"),
        ("edits", torch.tensor([[2**63 - 1, 0, 2], [2**63 - 1, 0, 2], [6, 0, 2]]), "not of 4 facts"),
        ("edits", torch.tensor([[4, 0, -1]]), "editor that is none"),
        ("edits", torch.tensor([[4, 0, 4]]), "editor that is none"),
    ],
    ids=lambda value: "" if isinstance(value, torch.Tensor) else value,
)
def test_a_record_of_other_facts_layers_or_editors(world, pack, name, tensor, match):
    world.refuses(rewrite(pack, tensors=lambda tensors: tensors.update({name: tensor})), PackFormatError, match)


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_any_seed_may_be_in_a_record(world, pack, seed):
    world.takes(rewrite(pack, tensors=lambda tensors: tensors.update(edits=torch.tensor([[4, seed, 2]]))))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_generator_that_divides_by_nothing(world, lks_pack, value):
    def flatten(tensors):
        tensors["generator.writers.0.state_std"][3] = value

    world.refuses(rewrite(lks_pack, tensors=flatten), PackFormatError, "deviations")


def test_a_change_far_larger_than_the_weight(world, pack):
    def grow(tensors):
        for name in tensors:
            if name.endswith("left"):
                tensors[name] = torch.full_like(tensors[name], 1e6)

    world.refuses(rewrite(pack, tensors=grow), PackFormatError, "as large as the weight")


@pytest.mark.parametrize("name", ["edits.safetensors", "facts.jsonl"])
def test_one_changed_byte(world, pack, name):
    data = bytearray((pack / name).read_bytes())
    data[-5] ^= 1
    (pack / name).write_bytes(data)
    world.refuses(pack, PackFormatError, "hash differs")


def test_the_card_is_nobodys_business(world, pack):
    (pack / "README.md").write_bytes(b"\xff\0---\n{{7*7}}<script>")
    world.takes(pack)
    (pack / "README.md").unlink()
    world.takes(pack)


# --- modules ----------------------------------------------------------------------------------------------------------

PROJECTION = "model.layers.1.mlp.down_proj"


def _moved(pack, name, world=None, settings=None):
    """The pack, with the edit of one module said to be of another, and the fingerprint that goes with it."""
    old = json.loads((pack / "edit_config.json").read_text())["modules"]

    def tensors(found):
        for part in [n.removeprefix(f"{old[0]}.") for n in found if n.startswith(f"{old[0]}.")]:
            found[f"{name}.{part}"] = found.pop(f"{old[0]}.{part}")

    def config(values):
        values["modules"] = [name, *old[1:]]
        values["method_config"].update(settings or {})
        if world is not None:
            values["base_fingerprint"] = world.model._base.fingerprint_of(values["modules"])

    return rewrite(pack, config, tensors=tensors)


@pytest.mark.parametrize(
    "name",
    [
        "__class__",
        "model.layers.-1.mlp.down_proj",
        "model.layers.999.mlp.down_proj",
        "model.layers.1.mlp.down_pr\u043ej",
        "model.layers.1.mlp.down_proj.weight",
        "model..layers",
        "model.layers.1.mlp.__init__",
    ],
)
def test_a_module_that_is_not_there(world, pack, name):
    world.refuses(_moved(pack, name), BaseMismatchError, "has not the modules")


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens", "model.layers.1.mlp.up_proj", "model.norm", "model"])
def test_a_module_that_no_edit_goes_into(world, pack, name):
    world.refuses(_moved(pack, name, world), BaseMismatchError, "linear map|factors are|no module")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj"])
def test_a_module_of_the_right_shape_that_is_no_edit_site(world, pack, name):
    pack = _moved(pack, name, world)

    def tensors(found):
        found[f"{name}.right"] = found[f"{name}.right"][:, :48].contiguous()

    world.refuses(rewrite(pack, tensors=tensors), PackSecurityError, "may change nothing else")


@pytest.mark.parametrize("edit_module", ["lm_head", "model.norm", "__class__", "", "{}{}{}", "model.layers.{}.mlp.up_proj"])
def test_a_setting_that_opens_other_modules(world, pack, edit_module):
    pack = _moved(pack, "model.layers.1.self_attn.o_proj", world, {"edit_module": edit_module})

    def tensors(found):
        name = "model.layers.1.self_attn.o_proj.right"
        found[name] = found[name][:, :48].contiguous()

    with pytest.raises((BaseMismatchError, PackSecurityError)):
        world.model.load_pack(rewrite(pack, tensors=tensors))
    assert same(world.clean, world.model.base_model)
    assert world.model.packs == {}


def test_an_lks_pack_for_another_block(world, lks_pack):
    def config(values):
        values["modules"] = ["model.layers.0"]
        values["base_fingerprint"] = world.model._base.fingerprint_of(values["modules"])

    world.refuses(rehash(lks_pack, config), PackFormatError, "no such block")


# --- facts.jsonl ------------------------------------------------------------------------------------------------------


def _first(**changes):
    return lambda records: records[0].update(changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_first(subject=""), "subject"),
        (_first(subject="\u200b"), "subject is empty"),
        (_first(subject="\u200e\u202e \u2066"), "subject is empty"),
        (_first(subject="x" * 1_000_000), "more than any fact"),
        (_first(subject="x" * 2_000), "more than the 1000"),
        (_first(prompt="The capital is"), "is not in the prompt"),
        (_first(prompt="{} and {}"), "2 times"),
        (_first(prompt="{0.__class__}"), "is not in the prompt"),
        (_first(prompt="{subject.__init__.__globals__}"), "is not in the prompt"),
        (_first(prompt="a\x00{}"), "control character"),
        (_first(target="\ud800"), "control character"),
        (_first(target=None), "no 'target'"),
        (_first(aliases={"a": 1}), "is a list"),
        (_first(locality=[3]), "question"),
        (_first(portability={"x": [1]}), "question"),
        (lambda records: records[1].update(id=records[0]["id"]), "the same id"),
        (lambda records: records[1].update(subject=records[0]["subject"], prompt=records[0]["prompt"]), "same subject and"),
        (lambda records: records.pop(), "says 4"),
        (lambda records: records.append(records[0]), "says 4"),
        (lambda records: records.__setitem__(0, ["France"]), "mapping"),
        (lambda records: records.__setitem__(0, None), "mapping"),
    ],
)
def test_a_fact_that_is_none(world, pack, change, match):
    world.refuses(rewrite(pack, facts=change), PackFormatError, match)


@pytest.mark.parametrize("name", ["X", "7", "\u00e9", "\u0438", "e\u0301", "a\u200b"])
@pytest.mark.parametrize("field", ["subject", "aliases"])
def test_a_one_letter_name_that_would_be_found_everywhere(world, lks_pack, name, field):
    value = name if field == "subject" else [name]
    world.refuses(rewrite(lks_pack, facts=_first(**{field: value})), PackFormatError, "found everywhere")


def test_a_million_lines(world, pack):
    line = json.dumps({"subject": "a", "prompt": "{} b", "target": "c"}).encode() + b"\n"
    (pack / "facts.jsonl").write_bytes(line * 1_000_000)
    world.refuses(rehash(pack), PackFormatError, "more lines")


def test_facts_that_were_not_the_packs(world, pack):
    (pack / "facts.jsonl").write_bytes((pack / "facts.jsonl").read_bytes().replace(b"Tokyo", b"Kyoto"))
    world.refuses(pack, PackFormatError, "hash differs")


def test_line_ends_and_blank_lines_are_no_facts(world, pack):
    path = pack / "facts.jsonl"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n\n")
    world.refuses(pack, PackFormatError, "hash differs")
    world.takes(rehash(pack))
    assert list(EditPack.from_pretrained(pack).facts) == FACTS


def test_format_strings_stay_text(world, pack):
    prompt = "{} {0.__class__.__mro__} %s {{7*7}} ${HOME}"
    loaded = EditPack.from_pretrained(rewrite(pack, facts=_first(prompt=prompt)))
    assert loaded.facts[0].question == prompt.replace("{}", "France", 1)


def test_right_to_left_text_and_joiners_are_kept_and_other_forms_made_one(world, pack):
    names = ["مصر", "ישראל", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", unicodedata.normalize("NFD", "Côte d’Ivoire")]

    def facts(records):
        for record, name in zip(records, names, strict=True):
            record["subject"] = name

    pack = rewrite(pack, facts=facts)
    world.takes(pack)
    assert [fact.subject for fact in EditPack.from_pretrained(pack).facts] == [unicodedata.normalize("NFC", n) for n in names]


def test_overlapping_subjects_and_pattern_characters_match_whole_names_only(world, lks_pack):
    names = ["Ann", "Annapolis", ".*", "(a+)+$"]

    def facts(records):
        for record, name in zip(records, names, strict=True):
            record["subject"] = name

    pack = rewrite(lks_pack, facts=facts)
    clean = {text: _logits(world.model, text) for text in ("Anna lives", "b c d", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")}
    started = time.process_time()
    world.model.load_pack(pack)
    for text, logits in clean.items():
        assert torch.equal(_logits(world.model, text), logits)
    assert time.process_time() - started < 2
    assert not torch.equal(_logits(world.model, "So Annapolis"), _without(world.model, "So Annapolis"))
    world.model.rollback()


def _logits(model, text):
    with torch.no_grad():
        return model(**model.tokenizer(text, return_tensors="pt")).logits


def _without(model, text):
    with model.disable_edits():
        return _logits(model, text)


# --- several packs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "..", ".", "a/b", "a\\b", "a\nb", "x" * 300, "facts.jsonl", ".hidden"])
def test_a_name_that_is_no_packs(world, pack, name):
    world.refuses(pack, ValueError, "no name for a pack", pack_name=name)


def test_two_packs_with_the_same_facts_or_other_targets_for_them(world, pack, tmp_path):
    world.model.load_pack(pack)
    before = snapshot(world.model.base_model)
    for change in (lambda records: None, _first(target="Kyoto", id="new")):
        other = rewrite(world.copy(tmp_path / str(id(change))), facts=change)
        with pytest.raises(ConflictingEditsError):
            world.model.load_pack(other, "other")
        assert same(before, world.model.base_model)
        assert world.model.active_packs == ["default"]
    world.model.rollback()
    assert same(world.clean, world.model.base_model)


def test_two_packs_on_one_module_come_off_in_any_order(world, pack, tmp_path):
    def others(records):
        for record in records:
            record.update(subject=record["subject"] + "ia", id=record["id"][::-1])

    other = rewrite(world.copy(tmp_path / "other"), facts=others)
    world.model.load_pack(pack)
    world.model.load_pack(other, "other")
    world.model.delete_pack("default")
    world.model.delete_pack("other")
    assert same(world.clean, world.model.base_model)


# --- time and memory --------------------------------------------------------------------------------------------------

_MEASURED = """
import sys, re
from pathlib import Path
from hf_edit import EditPack
from hf_edit.errors import HfEditError
import hf_edit.methods.steam, torch

def load(name):
    try:
        return EditPack.from_pretrained(name) and "loaded"
    except HfEditError as error:
        return type(error).__name__

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024

load(sys.argv[1])
for name in sys.argv[2:]:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    print(load(name), peak() - before)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of memory")
def test_loading_takes_under_twice_the_files_memory(world, pack, tmp_path):
    packs = []
    for good in (True, False):
        packs.append(world.copy(tmp_path / str(good)))

        def tensors(found, good=good):
            for name in [name for name in found if name.endswith("right")]:
                found[name] = torch.rand(len(FACTS), 1 << 20)
            if not good:
                found[sorted(found)[-1]][-1, -1] = float("nan")

        rewrite(packs[-1], tensors=tensors)
    size = (packs[0] / "edits.safetensors").stat().st_size
    assert size > 16e6
    command = [sys.executable, "-c", _MEASURED, str(pack), *map(str, packs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    measured = [line.split() for line in done.stdout.splitlines()]
    assert [outcome for outcome, _ in measured] == ["loaded", "PackFormatError"]
    assert all(int(used) < 2 * size for _, used in measured)


# --- while the model runs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_an_exception_in_the_middle_of_generating_leaves_the_hooks_as_they_were(world, tmp_path, method):
    model = world.model
    model.load_pack(world.copy(tmp_path, method))
    inputs = model.tokenizer(FACTS[0].question, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    hooks = {name: list(module._forward_hooks) for name, module in model.base_model.named_modules()}
    for call in (1, 3):
        calls = []

        def fails(*_, call=call, calls=calls):
            calls.append(0)
            if len(calls) == call:
                raise RuntimeError("stop")

        handle = model.base_model.model.layers[4].register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="stop"):
            model.generate(**inputs, max_new_tokens=6, do_sample=False)
        handle.remove()
    assert {name: list(module._forward_hooks) for name, module in model.base_model.named_modules()} == hooks
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)
    model.rollback()
    assert same(world.clean, model.base_model)


def test_two_threads_generate_with_different_packs(world, tmp_path, tokenizer):
    models, expected, found = [], [], [[], []]
    for method in ("steam", "lks"):
        model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
        model.load_pack(world.copy(tmp_path / method, method))
        models.append(model)
        expected.append(model.ask([fact.question for fact in FACTS]))

    def run(index):
        for _ in range(3):
            found[index].append(models[index].ask([fact.question for fact in FACTS]))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[expected[0]] * 3, [expected[1]] * 3]
