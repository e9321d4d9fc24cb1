"""`LKSEditor`s that are shared: on the Hub, and read as data from strangers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time

import pytest
import torch
from conftest import BASE, FACTS, QUICK_LKS, tiny_model
from hostile import safetensors
from hub_server import check_card
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from hf_edit import (
    BaseMismatchError,
    EditableModelForCausalLM,
    EditPack,
    Fact,
    HubError,
    LKSEditor,
    PackFormatError,
    PackSecurityError,
    Question,
    gate_training,
)
from hf_edit.cli import main
from hf_edit.methods.lks.editor import CONFIG_FILE, TENSORS_FILE

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client, towards its own transport

FEW = {**QUICK_LKS, "min_steps": 12}
UNSEEN = Fact("Portugal", "The capital of {} is", "Rome")
QUICK_EDIT = {"width": QUICK_LKS["width"], "train": False, "gate": False, "verify": False, "progress": False}


@pytest.fixture(scope="module")
def kept(tokenizer, tmp_path_factory):
    """The folder of an editor for the tiny model, trained for a moment."""
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    return LKSEditor.train(model, FACTS, progress=False, **FEW).save_pretrained(tmp_path_factory.mktemp("editors") / "editor")


@pytest.fixture
def folder(kept, tmp_path):
    """A copy of it, to tamper with."""
    return shutil.copytree(kept, tmp_path / "editor")


@pytest.fixture
def editor(hub):
    """An editor for the model on the Hub."""
    return LKSEditor.train(EditableModelForCausalLM.from_pretrained(BASE), FACTS, progress=False, **FEW)


def _same(one, other):
    state = one.generator.state_dict()
    known = ("form", "layer", "base_fingerprint", "tokenizer_fingerprint", "num_facts", "base_model")
    return all(getattr(one, name) == getattr(other, name) for name in known) and all(
        torch.equal(t, state[name]) for name, t in other.generator.state_dict().items()
    )


# --- on the Hub -------------------------------------------------------------------------------------------------------


def test_an_editor_goes_to_the_hub_in_one_commit_and_comes_back(hub, editor, tmp_path):
    commit = editor.push_to_hub("me/editor", private=True, commit_message="An editor", tags="tiny")
    assert hub.repos["me/editor"].private
    assert set(hub.repos["me/editor"].at("main").files) - {".gitattributes"} == {"README.md", CONFIG_FILE, TENSORS_FILE}
    titles = [c.title for c in HfApi(endpoint=hub.endpoint).list_repo_commits("me/editor")]
    assert titles == ["An editor", "initial commit"]
    again = LKSEditor.from_pretrained("me/editor")
    assert _same(again, editor)
    assert again.base_model == BASE
    assert editor.push_to_hub("me/editor", tags="tiny").oid == commit.oid  # the same files again
    editor.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert _same(LKSEditor.from_pretrained("me/mine"), LKSEditor.from_pretrained(tmp_path / "mine"))


def test_an_editor_is_loaded_by_revision_with_a_token_and_from_the_cache(hub, editor, monkeypatch):
    first = editor.push_to_hub("me/editor", private=True).oid
    proposed = editor.push_to_hub("me/editor", create_pr=True, tags="proposed")
    hub.add("me/editor", {CONFIG_FILE: b"{}"}, title="spoiled")
    assert _same(LKSEditor.from_pretrained("me/editor", revision=first), editor)
    assert _same(LKSEditor.from_pretrained("me/editor", revision=proposed.pr_revision), editor)
    with pytest.raises(PackFormatError, match="has no 'format_version'"):
        LKSEditor.from_pretrained("me/editor")
    monkeypatch.setenv("HF_TOKEN", hub.token("you"))
    with pytest.raises(HubError, match="or it is private"):
        LKSEditor.from_pretrained("me/editor")
    assert _same(LKSEditor.from_pretrained("me/editor", revision=first, token=hub.token("me")), editor)
    hub.stop()
    assert _same(LKSEditor.from_pretrained("me/editor", revision=first, local_files_only=True), editor)


def test_the_command_line_pushes_an_editor(hub, editor, tmp_path, capsys):
    editor.save_pretrained(tmp_path / "mine")
    assert main(["push", str(tmp_path / "mine"), "me/pushed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == hub.repos["me/pushed"].at("main").sha
    assert _same(LKSEditor.from_pretrained("me/pushed"), editor)


def test_a_repo_without_an_editor_is_told(hub):
    with pytest.raises(HubError, match=rf"{BASE} .* holds no LKSEditor: there is no {CONFIG_FILE}"):
        LKSEditor.from_pretrained(BASE)
    with pytest.raises(FileNotFoundError, match="no id of a repo"):
        LKSEditor.from_pretrained("../editor")


def test_a_pack_made_with_an_editor_from_the_hub_loads_without_it(hub, editor, tmp_path):
    editor.push_to_hub("me/editor")
    model = EditableModelForCausalLM.from_pretrained(BASE)
    model.edit(UNSEEN, "lks", editor="me/editor", **QUICK_EDIT)
    model.push_to_hub("me/rome")
    del hub.repos["me/editor"]
    shutil.rmtree(tmp_path / "cache" / "models--me--editor")
    hub.requests.clear()
    again = EditableModelForCausalLM.from_pretrained("me/rome")
    assert again.packs["default"] == model.packs["default"]
    assert again.packs["default"].config.editor == "me/editor"
    again.edit(FACTS[0], "lks", train=False, editor="given", **{k: v for k, v in QUICK_EDIT.items() if k != "train"})
    assert again.list_edits() == [UNSEEN, FACTS[0]]
    assert not hub.asked("me/editor")


def test_a_shared_pack_does_not_tell_where_its_editor_lies(hub, editor, tmp_path):
    folder = editor.save_pretrained(tmp_path / "secret-place")
    model = EditableModelForCausalLM.from_pretrained(BASE)
    for given in (str(folder), folder, editor):
        model.edit(UNSEEN, "lks", editor=given, **QUICK_EDIT)
        model.push_to_hub("me/rome")
        assert not any(b"secret-place" in blob.content for blob in hub.repos["me/rome"].at("main").files.values())
        assert EditPack.from_pretrained("me/rome").config.editor == "given"
        model.rollback()


def test_the_card_tells_what_the_editor_is_and_its_snippet_runs(hub, editor, capsys):
    editor.push_to_hub("me/editor")
    text = hub.repos["me/editor"].at("main").files["README.md"].content.decode()
    assert check_card(text) == ([], [])
    for expected in (
        "library_name: hf_edit",
        f"base_model: {BASE}",
        "- `generator`: context",
        "trained on: 4",
        "- gate: trained by the edit",
        "## Misuse",
    ):
        assert expected in text
    exec(re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1], {})
    assert "The capital of France is" in capsys.readouterr().out


def test_an_editor_of_a_base_in_a_local_folder_does_not_tell_where_that_lies(hub, base_files, tmp_path):
    (tmp_path / "secret-place").mkdir()
    for name, content in base_files.items():
        (tmp_path / "secret-place" / name).write_bytes(content)
    model = EditableModelForCausalLM.from_pretrained(tmp_path / "secret-place")
    LKSEditor.train(model, FACTS, progress=False, **FEW).push_to_hub("me/editor")
    files = hub.repos["me/editor"].at("main").files
    assert not any(b"secret-place" in blob.content for blob in files.values())
    assert check_card(files["README.md"].content.decode()) == ([], [])
    assert LKSEditor.from_pretrained("me/editor").base_model is None


@pytest.fixture
def with_gate(tokenizer, quick_gate, monkeypatch, tmp_path):
    """The folder of an editor that learned a gate, and the model that it is for."""
    monkeypatch.setattr(gate_training, "_FEWEST", 6)
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    facts = [
        Fact(f"Nowhere {n}", "The capital of {} is", "Rome", rephrases=("{}'s seat of government is",),
             locality=(Question(f"The king of Nowhere {n} is called"),))
        for n in range(6)
    ]  # fmt: skip
    editor = LKSEditor.train(model, facts, progress=False, **{**FEW, "min_steps": 1, "gate": True})
    return editor.save_pretrained(tmp_path / "with gate"), model


def test_an_editor_trained_on_facts_with_wordings_of_their_own_brings_its_gate(with_gate):
    folder, model = with_gate
    gate = LKSEditor.from_pretrained(folder).gate
    for quiet in (0.5, 0.97):
        model.edit(UNSEEN, "lks", editor=folder, **{**QUICK_EDIT, "gate": True, "gate_quiet": quiet})
        tensors = model.packs["default"].tensors
        assert torch.equal(tensors["gate.projection"], gate.gate.projection)
        assert torch.equal(tensors["gate.threshold"], gate.at(quiet).threshold)
        model.rollback()


def test_an_editor_with_a_gate_of_another_form_is_refused(with_gate):
    folder, model = with_gate
    whole = load_file(folder / TENSORS_FILE)
    for name, tensor in (("gate.others", torch.zeros(1)), ("gate.mean", torch.zeros(3)), ("gate.more", torch.zeros(1))):
        save_file({**whole, name: tensor}, folder / TENSORS_FILE)
        _refused(_rehashed(folder), PackFormatError, "editor.safetensors: the gate")
    save_file({**whole, "gate.block": torch.tensor([5.0])}, folder / TENSORS_FILE)  # above the block that is edited
    with pytest.raises(BaseMismatchError, match="another base model"):
        model.edit(UNSEEN, "lks", editor=_rehashed(folder), **{**QUICK_EDIT, "gate": True})


# --- from strangers ---------------------------------------------------------------------------------------------------


def _refused(folder, error, match):
    """Reading the editor ends with just this error, and soon."""
    started = time.process_time()
    with pytest.raises(error, match=match) as raised:
        LKSEditor.from_pretrained(folder)
    assert raised.type is error
    assert time.process_time() - started < 2


def _rehashed(folder, **changes):
    """An editor with changes to its configuration, whose hashes are right all the same."""
    config = {**json.loads((folder / CONFIG_FILE).read_text()), **changes}
    if "tensors_sha256" not in changes:
        config["tensors_sha256"] = hashlib.sha256((folder / TENSORS_FILE).read_bytes()).hexdigest()
    config.pop("config_sha256")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "config_sha256": digest}))
    return folder


def test_an_editor_that_nobody_touched_is_read(kept, folder):
    assert _same(LKSEditor.from_pretrained(_rehashed(folder)), LKSEditor.from_pretrained(kept))


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE])
def test_a_file_that_is_missing_or_no_file_or_somewhere_else(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    kind = FileNotFoundError if name == CONFIG_FILE else PackFormatError
    _refused(folder, kind, "holds no LKSEditor|incomplete")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    _refused(folder, PackSecurityError, "link out of the pack")
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    _refused(folder, PackFormatError, "link to nothing")
    (folder / name).unlink()
    (folder / name).mkdir()
    _refused(folder, PackFormatError, "no regular file")
    (folder / name).rmdir()
    os.mkfifo(folder / name)
    _refused(folder, PackFormatError, "no regular file")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "no JSON object"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (b'{"layer": NaN}', "NaN is no JSON"),
        (b'{"layer": 1, "layer": 2}', "stands twice"),
        (b"[" * 3000, "not valid JSON"),
        (b'{"layer": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * 10_000_000, "more than the 65536"),
    ],
    ids=["cut", "list", "bom", "nan", "twice", "deep", "digits", "10MB"],
)
def test_a_configuration_that_is_no_plain_json_object(folder, data, match):
    (folder / CONFIG_FILE).write_bytes(data)
    _refused(folder, PackFormatError, match)


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("format_version", 2, "pip install --upgrade"),
        ("format_version", 0, "none before 1"),
        ("format_version", True, "wrong type"),
        ("extra", 1, "unknown keys: extra"),
        ("generator", "os.system", "generator"),
        ("generator", "linear", "generator"),
        ("layer", "3", "wrong type"),
        ("layer", -1, "layer"),
        ("base_model", "../../x", "base_model"),
        ("base_model", "https://example.com/x", "base_model"),
        ("base_model", "org/base\n", "base_model"),
        ("base_fingerprint", "", "base_fingerprint"),
        ("base_fingerprint", "`x`", "base_fingerprint"),
        ("num_facts", -1, "num_facts"),
        ("num_facts", 1 << 70, "num_facts"),
        ("tensors_sha256", "../../etc/passwd", "tensors_sha256"),
        ("tensors_sha256", "0" * 64, "its hash differs"),
        ("version", "1\x1b[2J", "version"),
    ],
)
def test_a_key_of_a_wrong_kind_or_out_of_range(folder, key, value, match):
    _refused(_rehashed(folder, **{key: value}), PackFormatError, match)


def test_one_byte_that_was_changed(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "layer": config["layer"] - 1}))
    _refused(folder, PackFormatError, "changed since the editor was saved")
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    data = bytearray((folder / TENSORS_FILE).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS_FILE).write_bytes(data)
    _refused(folder, PackFormatError, "its hash differs")


def _with(name, value):
    return lambda tensors: {**tensors, name: value(tensors[name]) if callable(value) else value}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_with("writers.0.out.weight", lambda t: t * float("nan")), "NaN or infinity"),
        (_with("writers.0.state_std", lambda t: t * float("inf")), "NaN or infinity"),
        (_with("writers.0.state_mean", lambda t: t + 1e30), "far out of any scale"),
        (_with("writers.0.state_std", lambda t: t * 0), "not above zero"),
        (_with("writers.0.out.weight", lambda t: t.float()), "another precision"),
        (_with("writers.0.out.bias", lambda t: t.half()), "another precision"),
        (_with("feature_in.weight", lambda t: t.T.contiguous()), "does not hold a generator"),
        (_with("writers.0.out.bias", torch.zeros(1)), "does not hold a generator"),
        (_with("feature_in.weight", torch.zeros(3, dtype=torch.float16)), "does not hold a generator"),
        (_with("__class__", torch.zeros(2)), "does not hold a generator"),
        (lambda tensors: {k: v for k, v in tensors.items() if k != "writers.0.state_in.weight"}, "does not hold a generator"),
        (lambda tensors: {f"t{i}": torch.zeros(1) for i in range(5000)}, "more than any"),
    ],
)
def test_tensors_that_are_no_editors(folder, change, match):
    save_file(change(load_file(folder / TENSORS_FILE)), folder / TENSORS_FILE)
    _refused(_rehashed(folder), PackFormatError, match)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"PK\x03\x04" * 10,
        (1 << 62).to_bytes(8, "little") + b"{}",
        safetensors({"feature_mean": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"\0" * 4),
        safetensors({"feature_mean": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}, b"\0" * 4),
        safetensors({"feature_mean": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"\0" * 8),
    ],
    ids=["empty", "pickle", "zip", "header", "huge", "huger", "hole"],
)
def test_a_tensor_file_that_is_malformed(folder, data):
    (folder / TENSORS_FILE).write_bytes(data)
    _refused(_rehashed(folder), PackFormatError, "editor.safetensors")


def test_an_editor_that_does_not_fit_the_base_that_it_names_is_refused(llama, folder):
    wide = load_file(folder / TENSORS_FILE)
    doubled = {
        name: t.repeat(2) if t.dim() == 1 and name not in ("feature_in.bias", "token_in.bias") else t
        for name, t in wide.items()
    }
    doubled |= {name: t.repeat(1, 2) for name, t in wide.items() if name.endswith("_in.weight")}
    doubled |= {name: t.repeat(2, 1) for name, t in wide.items() if name.endswith("out.weight")}
    save_file(doubled, folder / TENSORS_FILE)
    config = json.loads((folder / CONFIG_FILE).read_text())
    editor = LKSEditor.from_pretrained(_rehashed(folder))
    assert editor.base_fingerprint == llama._base.fingerprint
    with pytest.raises(BaseMismatchError, match="another base model"):
        llama.edit(UNSEEN, "lks", editor=folder, **{**QUICK_EDIT, "width": editor.settings["width"]})
    save_file(wide, folder / TENSORS_FILE)
    with pytest.raises(ValueError, match=f"pass layer={config['layer'] + 1}"):
        llama.edit(UNSEEN, "lks", editor=_rehashed(folder, layer=config["layer"] + 1), **QUICK_EDIT)
    assert llama.list_edits() == []
