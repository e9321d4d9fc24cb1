"""Packs, models and key statistics on the Hub, over HTTP with the real client, against the server in hub_server.py."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE, FACTS, QUICK_STEAM
from hub_server import HubServer, pointed_at
from huggingface_hub import HfApi, constants

from hf_edit import (
    BaseMismatchError,
    EditableModelForCausalLM,
    EditPack,
    HubError,
    KeyStatistics,
    PackFormatError,
    PackSecurityError,
)

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the client, towards its own transport

PACK_FILES = {"README.md", "edit_config.json", "edits.safetensors", "facts.jsonl"}


@pytest.fixture(scope="module")
def edited(base_files, tmp_path_factory):
    """A pack of two facts on the base model as it is on the Hub, and how the edited model's logits are."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch, HubServer() as server, pointed_at(server, cache, patch):
        server.add(BASE, base_files)
        model = EditableModelForCausalLM.from_pretrained(BASE)
        model.edit(FACTS[:2], "memit", progress=False, **QUICK_STEAM)
        return model.packs["default"], _logits(model)


def _logits(model):
    ids = torch.tensor([model.tokenizer(FACTS[0].question)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def _files(hub, repo_id="me/lyon", revision="main"):
    return {path for path in hub.repos[repo_id].at(revision).files if path != ".gitattributes"}


def _move_on(hub, repo_id, files):
    """Whoever owns the repo pushes something else."""
    return hub.add(repo_id, files, title="moved on").sha


# --- push and load ------------------------------------------------------------------------------------------------------


def test_a_pushed_model_is_its_pack_and_comes_back_with_its_base(hub, edited):
    pack, logits = edited
    model = EditableModelForCausalLM.from_pretrained(BASE)
    model.load_pack(pack)
    commit = model.push_to_hub("me/lyon")
    assert _files(hub) == PACK_FILES
    assert commit.oid == hub.repos["me/lyon"].at("main").sha
    again = EditableModelForCausalLM.from_pretrained("me/lyon")
    assert again.packs["default"] == pack
    assert torch.equal(_logits(again), logits)


def test_a_push_is_one_commit_even_of_several_packs(hub, edited):
    pack, _ = edited
    model = EditableModelForCausalLM.from_pretrained(BASE)
    model.load_pack(pack)
    model.edit(FACTS[2], "rome", pack_name="more", progress=False, verify=False, **QUICK_STEAM)
    model.push_to_hub("me/lyon", commit_message="Lyon and more", commit_description="Because.")
    commits = HfApi(endpoint=hub.endpoint).list_repo_commits("me/lyon")
    assert [(c.title, c.message) for c in commits] == [("Lyon and more", "Because."), ("initial commit", "")]
    assert _files(hub) == PACK_FILES | {f"more/{name}" for name in PACK_FILES}
    again = EditableModelForCausalLM.from_pretrained("me/lyon")
    assert again.list_edits() == FACTS[:3]
    assert EditPack.from_pretrained("me/lyon", pack_name="more") == again.packs["more"]


def test_packs_that_are_all_named_have_a_card_for_the_repo(hub, edited):
    model = EditableModelForCausalLM.from_pretrained(BASE)
    model.load_pack(edited[0], "lyon")
    model.push_to_hub("me/packs")
    assert _files(hub, "me/packs") == {"README.md"} | {f"lyon/{name}" for name in PACK_FILES}
    assert EditableModelForCausalLM.from_pretrained("me/packs").active_packs == ["lyon"]
    with pytest.raises(HubError, match=r"holds no edit pack 'paris': there is no paris/edit_config\.json"):
        EditPack.from_pretrained("me/packs", pack_name="paris")


def test_base_weights_are_never_uploaded(hub, edited, tmp_path):
    model = EditableModelForCausalLM.from_pretrained(BASE)
    with pytest.raises(ValueError, match="no edits to save"):
        model.push_to_hub("me/lyon")
    model.load_pack(edited[0])
    model.save_pretrained(tmp_path / "lyon", push_to_hub=True)
    sent = sum(len(blob.content) for blob in hub.repos["me/lyon"].at("main").files.values())
    assert sent < len(hub.repos[BASE].at("main").files["model.safetensors"].content)
    assert _files(hub) == PACK_FILES
    assert not hub.asked(rf"hub (POST|PUT) .*{BASE}")


def test_saving_and_pushing_in_one_go_takes_the_folders_name(hub, edited, tmp_path):
    edited[0].save_pretrained(tmp_path / "lyon", push_to_hub=True, private=True)
    assert hub.repos["me/lyon"].private
    assert EditPack.from_pretrained("me/lyon") == EditPack.from_pretrained(tmp_path / "lyon") == edited[0]


def test_pushing_the_same_again_makes_no_commit(hub, edited):
    first = edited[0].push_to_hub("me/lyon")
    assert edited[0].push_to_hub("me/lyon").oid == first.oid


def test_key_statistics_go_to_the_hub_and_come_back(hub, llama):
    made = KeyStatistics.compute(llama, num_tokens=256, resume=False, progress=False)
    made.push_to_hub("me/stats", tags="tiny")
    assert _files(hub, "me/stats") == {"README.md", "key_statistics.json", "key_statistics.safetensors"}
    again = KeyStatistics.from_pretrained("me/stats")
    assert again.fingerprint == made.fingerprint
    assert all(torch.equal(m.total, made.moments[name].total) for name, m in again.moments.items())
    with pytest.raises(HubError, match=r"holds no key statistics"):
        KeyStatistics.from_pretrained(BASE)
    quick = {**QUICK_STEAM, "statistics_tokens": None, "layers": [1]}
    llama.edit(FACTS[0], "rome", progress=False, verify=False, statistics="me/stats", **quick)
    assert llama.list_edits() == [FACTS[0]]


def test_large_files_go_up_in_parts(hub, edited):
    hub.part_bytes = 512
    edited[0].push_to_hub("me/lyon")
    assert len(hub.asked("storage PUT /parts/")) > 1
    assert EditPack.from_pretrained("me/lyon") == edited[0]


# --- revisions ----------------------------------------------------------------------------------------------------------


def test_pack_and_base_are_pinned_to_full_shas(hub, edited):
    pack, logits = edited
    base_sha = hub.repos[BASE].at("main").sha
    assert pack.base["base_model_name_or_path"] == BASE
    assert pack.base["base_model_revision"] == base_sha
    pack.push_to_hub("me/lyon")
    _move_on(hub, BASE, {"model.safetensors": b"another model", "config.json": b"{}"})
    model = EditableModelForCausalLM.from_pretrained("me/lyon")
    assert torch.equal(_logits(model), logits)
    fetched = hub.asked(rf"hub (GET|HEAD) .*{BASE}/resolve/")
    assert fetched
    assert all(f"/resolve/{base_sha}/" in r.path for r in fetched)


def test_one_commit_is_read_even_when_the_branch_moves_in_between(hub, edited):
    edited[0].push_to_hub("me/lyon")
    before = hub.repos["me/lyon"].at("main").sha

    def move(request):
        if "/resolve/" in request.path:
            hub.on_request = None
            _move_on(hub, "me/lyon", dict.fromkeys(PACK_FILES, b"something else"))

    hub.on_request = move
    assert EditPack.from_pretrained("me/lyon") == edited[0]
    assert hub.repos["me/lyon"].at("main").sha != before
    assert all(f"/resolve/{before}/" in r.path for r in hub.asked("hub (GET|HEAD) /me/lyon/resolve/"))


def test_a_base_that_moves_in_between_is_read_at_one_commit(hub, edited):
    def move(request):
        if "/resolve/" in request.path:
            hub.on_request = None
            _move_on(hub, BASE, {"model.safetensors": b"another model"})

    hub.on_request = move
    model = EditableModelForCausalLM.from_pretrained(BASE)
    model.load_pack(edited[0])
    assert torch.equal(_logits(model), edited[1])


def test_branches_tags_pull_requests_and_shas_are_loaded_by_name(hub, edited):
    pack, _ = edited
    first = pack.push_to_hub("me/lyon").oid
    HfApi(endpoint=hub.endpoint).create_tag("me/lyon", tag="v1")
    one = pack.remove([str(FACTS[1].id)])
    one.push_to_hub("me/lyon", revision="short")
    proposed = one.push_to_hub("me/lyon", create_pr=True, commit_description="Fewer.")
    assert proposed.pr_url == f"{hub.endpoint}/me/lyon/discussions/1"
    for revision, expected in (("v1", pack), (first, pack), ("short", one), (proposed.pr_revision, one), (None, pack)):
        assert EditPack.from_pretrained("me/lyon", revision=revision).facts == expected.facts
    model = EditableModelForCausalLM.from_pretrained("me/lyon", revision="short")
    assert model.list_edits() == [FACTS[0]]
    with pytest.raises(HubError, match="no revision 'v2'"):
        EditPack.from_pretrained("me/lyon", revision="v2")


def test_a_pull_request_reaches_other_peoples_repos(hub, edited):
    hub.add("you/lyon", {"README.md": b"yours"})
    with pytest.raises(HubError, match="create_pr=True"):
        edited[0].push_to_hub("you/lyon")
    edited[0].push_to_hub("you/lyon", create_pr=True)
    assert _files(hub, "you/lyon") == {"README.md"}
    assert _files(hub, "you/lyon", "refs/pr/1") == PACK_FILES


def test_tags_join_those_of_the_card(hub, edited):
    edited[0].push_to_hub("me/lyon", tags=["geography", "knowledge-editing"])
    card = hub.repos["me/lyon"].at("main").files["README.md"].content.decode()
    assert re.search(r"tags:\n- knowledge-editing\n- hf_edit:memit\n- geography\n", card)


# --- without a connection -----------------------------------------------------------------------------------------------


def test_what_was_loaded_once_loads_offline(hub, edited, monkeypatch):
    pack, logits = edited
    pack.push_to_hub("me/lyon")
    EditableModelForCausalLM.from_pretrained("me/lyon")
    count = len(hub.requests)
    again = EditableModelForCausalLM.from_pretrained("me/lyon", local_files_only=True)
    assert torch.equal(_logits(again), logits)
    assert len(hub.requests) == count
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert EditableModelForCausalLM.from_pretrained("me/lyon").packs["default"] == pack
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    assert EditableModelForCausalLM.from_pretrained("me/lyon").packs["default"] == pack


@pytest.mark.parametrize("how", ["local_files_only", "offline", "unreachable"])
def test_a_cold_cache_offline_says_so(hub, edited, monkeypatch, how):
    edited[0].push_to_hub("me/lyon")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if how == "unreachable":
        hub.stop()
    for load in (EditableModelForCausalLM.from_pretrained, EditPack.from_pretrained, EditPack.inspect):
        with pytest.raises(HubError, match=r"me/lyon, revision 'main', is not in the cache.*connection"):
            load("me/lyon", local_files_only=how == "local_files_only")


def test_downloads_go_to_the_cache_that_is_named_and_are_repeated_on_demand(hub, edited, tmp_path):
    edited[0].push_to_hub("me/lyon")
    EditableModelForCausalLM.from_pretrained("me/lyon", cache_dir=tmp_path / "elsewhere")
    assert {path.name for path in (tmp_path / "elsewhere").glob("models--*")} == {"models--me--lyon", "models--org--base"}
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    count = len(hub.asked("storage GET"))
    EditPack.from_pretrained("me/lyon", cache_dir=tmp_path / "elsewhere")
    assert len(hub.asked("storage GET")) == count
    EditPack.from_pretrained("me/lyon", cache_dir=tmp_path / "elsewhere", force_download=True)
    assert len(hub.asked("storage GET")) == count + 1
    with pytest.raises(ValueError, match="contradict"):
        EditPack.from_pretrained("me/lyon", force_download=True, local_files_only=True)


def test_the_whole_cache_is_read_after_an_interrupted_download(hub, edited):
    edited[0].push_to_hub("me/lyon")
    hub.on_request = lambda r: hub.objects.clear() if "edits.safetensors" in r.path else None
    with pytest.raises(OSError, match="me/lyon"):
        EditPack.from_pretrained("me/lyon")
    with pytest.raises(HubError, match="not in the cache, or not whole"):
        EditPack.from_pretrained("me/lyon", local_files_only=True)


# --- what can't be had --------------------------------------------------------------------------------------------------


def test_missing_and_private_repos_are_told_alike(hub, edited, monkeypatch):
    edited[0].push_to_hub("me/secret", private=True)
    assert EditPack.from_pretrained("me/secret") == edited[0]
    monkeypatch.setenv("HF_TOKEN", hub.token("you"))
    for name in ("me/secret", "me/nothing"):
        with pytest.raises(HubError, match=f"no repo '{name}' on the Hub, or it is private.*log in.*token="):
            EditableModelForCausalLM.from_pretrained(name)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="or it is private"):
        EditPack.from_pretrained("me/secret", revision="main")
    assert EditPack.from_pretrained("me/secret", token=hub.token("me")) == edited[0]


def test_a_gated_base_says_where_to_ask_for_access(hub, edited):
    edited[0].push_to_hub("me/lyon")
    hub.repos[BASE].gated = True
    with pytest.raises(HubError, match=rf"base that the pack in me/lyon .* is gated: ask for access on {hub.endpoint}/{BASE}"):
        EditableModelForCausalLM.from_pretrained("me/lyon")
    with pytest.raises(HubError, match="is gated"):
        EditableModelForCausalLM.from_pretrained(BASE)
    hub.repos[BASE].readers.add("me")
    assert EditableModelForCausalLM.from_pretrained("me/lyon").packs["default"] == edited[0]


def test_a_gated_pack_says_where_to_ask_for_access(hub, edited, monkeypatch):
    edited[0].push_to_hub("me/lyon")
    hub.repos["me/lyon"].gated = True
    for user in ("you", None):
        monkeypatch.setenv("HF_TOKEN", hub.token(user)) if user else monkeypatch.delenv("HF_TOKEN")
        for load in (EditPack.from_pretrained, EditPack.inspect):
            with pytest.raises(HubError, match=r"me/lyon is gated: ask for access on .*/me/lyon"):
                load("me/lyon")


def test_a_base_that_is_gone_is_named(hub, edited, tmp_path, base_files):
    edited[0].push_to_hub("me/lyon")
    del hub.repos[BASE]
    with pytest.raises(HubError, match=f"base that the pack in me/lyon .* no repo '{BASE}'.*base_model="):
        EditableModelForCausalLM.from_pretrained("me/lyon")
    for name, content in base_files.items():
        (tmp_path / name).write_bytes(content)
    model = EditableModelForCausalLM.from_pretrained("me/lyon", base_model=tmp_path)
    assert torch.equal(_logits(model), edited[1])


def test_an_empty_repo_and_one_without_a_pack_are_told(hub):
    hub.add("me/empty", {".gitattributes": b""})
    with pytest.raises(HubError, match=r"me/empty \(commit \w{8}\) holds neither an edit pack .* nor a model"):
        EditableModelForCausalLM.from_pretrained("me/empty")
    for name in ("me/empty", BASE):
        for load in (EditPack.from_pretrained, EditPack.inspect):
            with pytest.raises(HubError, match=rf"{name} .* holds no edit pack: there is no edit_config\.json"):
                load(name)


def test_what_is_neither_a_folder_nor_an_id_is_told(hub):
    for name in ("/no/such/folder", "a/b/c", "../x", Path("me/lyon")):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            EditableModelForCausalLM.from_pretrained(name)
    assert hub.requests == []


@pytest.mark.parametrize("missing", ["facts.jsonl", "edits.safetensors"])
def test_an_incomplete_pack_is_refused(hub, edited, missing):
    edited[0].push_to_hub("me/lyon")
    HfApi(endpoint=hub.endpoint).delete_file(missing, "me/lyon")
    with pytest.raises(PackFormatError, match="incomplete"):
        EditPack.from_pretrained("me/lyon")


def test_one_may_not_push_without_a_token_or_to_others(hub, edited, monkeypatch):
    with pytest.raises(HubError, match=r"may not write to you/mine \(HTTP 403\)"):
        edited[0].push_to_hub("you/mine")
    monkeypatch.delenv("HF_TOKEN")
    for name in ("me/lyon", "lyon"):
        with pytest.raises(HubError, match="log in"):
            edited[0].push_to_hub(name)
    with pytest.raises(HubError, match="log in"):
        edited[0].push_to_hub("me/lyon", token="hf_wrong")
    assert "me/lyon" not in hub.repos


# --- trust --------------------------------------------------------------------------------------------------------------


def _push_by_hand(hub, pack, tmp_path, **changes):
    """A pack uploaded file by file, with changes to its configuration."""
    folder = pack.save_pretrained(tmp_path / "hand")
    config = json.loads((folder / "edit_config.json").read_text())
    (folder / "edit_config.json").write_text(json.dumps({**config, **changes}))
    hub.add("me/hand", {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.mark.parametrize("name", ["../../x", "/etc", "https://example.com/x", "C:\\x", "a/b/c", "org/base\n", "~", "."])
def test_a_pack_from_the_hub_names_a_hub_base_only(hub, edited, tmp_path, name):
    _push_by_hand(hub, edited[0], tmp_path, base_model_name_or_path=name)
    for load in (EditableModelForCausalLM.from_pretrained, EditPack.from_pretrained):
        with pytest.raises((PackSecurityError, PackFormatError)):
            load("me/hand")
    assert not hub.asked("hub .*org/base")


@pytest.mark.parametrize("revision", ["main", "0123abc", "refs/pr/1", "F" * 40])
def test_a_pack_from_the_hub_names_its_bases_commit_by_its_full_sha(hub, edited, tmp_path, revision):
    _push_by_hand(hub, edited[0], tmp_path, base_model_revision=revision)
    with pytest.raises((PackSecurityError, PackFormatError)):
        EditableModelForCausalLM.from_pretrained("me/hand")


def test_a_local_folder_is_not_taken_for_the_hub_base_of_a_pack_from_the_hub(hub, edited, tmp_path, monkeypatch):
    edited[0].push_to_hub("me/lyon")
    (tmp_path / "org" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PackSecurityError, match="local path of that name"):
        EditableModelForCausalLM.from_pretrained("me/lyon")


def test_loading_a_pack_asks_only_for_its_repo_and_its_base(hub, edited):
    edited[0].push_to_hub("me/lyon")
    hub.add("me/lyon", {"weights.bin": b"never read", "code.py": b"raise SystemExit", "config.json": b"{}"})
    hub.requests.clear()
    EditableModelForCausalLM.from_pretrained("me/lyon")
    assert not hub.asked(r"hub (?!(GET|HEAD) (/api/(models|resolve-cache/models))?/(me/lyon|org/base)\b)")
    assert not hub.asked(r"weights\.bin|code\.py")


def test_a_shared_pack_does_not_tell_where_a_local_base_lies(hub, base_files, tmp_path, caplog):
    (tmp_path / "secret-place").mkdir()
    for name, content in base_files.items():
        (tmp_path / "secret-place" / name).write_bytes(content)
    model = EditableModelForCausalLM.from_pretrained(tmp_path / "secret-place")
    model.edit(FACTS[0], "rome", progress=False, verify=False, **QUICK_STEAM)
    model.push_to_hub("me/lyon")
    assert "base is a local folder" in caplog.text
    assert not any(b"secret-place" in blob.content for blob in hub.repos["me/lyon"].at("main").files.values())
    with pytest.raises(BaseMismatchError, match="base_model="):
        EditableModelForCausalLM.from_pretrained("me/lyon")
    again = EditableModelForCausalLM.from_pretrained("me/lyon", base_model=tmp_path / "secret-place")
    assert again.list_edits() == [FACTS[0]]


def test_a_token_reaches_no_file_no_log_no_error_and_no_storage(hub, base_files, tmp_path, monkeypatch, caplog, capsys):
    token = hub.token("me")
    monkeypatch.delenv("HF_TOKEN")
    caplog.set_level(logging.DEBUG)
    model = EditableModelForCausalLM.from_pretrained(BASE, token=token)
    report = model.edit(FACTS[0], "rome", progress=False, **QUICK_STEAM)
    model.save_pretrained(tmp_path / "pack")
    model.push_to_hub("me/lyon", token=token, private=True)
    EditableModelForCausalLM.from_pretrained("me/lyon", token=token)
    with pytest.raises(HubError) as raised:
        model.push_to_hub("you/lyon", token=token)
    shown = [str(report), json.dumps(report.to_dict()), repr(model), str(raised.value), caplog.text, *capsys.readouterr()]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(token in text for text in shown)
    assert not any(token.encode() in path.read_bytes() for path in files)
    assert not any(token.encode() in blob.content for blob in hub.repos["me/lyon"].at("main").files.values())
    assert hub.asked("storage PUT")
    assert not any(token in str(request.headers) for request in hub.asked("^storage"))
    assert all(token in request.headers["authorization"] for request in hub.asked("hub POST /api/models/me/lyon/commit"))


# --- inspecting ---------------------------------------------------------------------------------------------------------


def test_inspecting_and_loading_read_the_files_that_the_repo_shows(hub, edited, tmp_path):
    """Never others that a dot folder holds: those are not even downloaded."""
    edited[0].push_to_hub("me/lyon")
    other = edited[0].remove([str(FACTS[0].id)])
    other.save_pretrained(tmp_path / "other")
    shown = {path: blob.content for path, blob in hub.repos["me/lyon"].at("main").files.items()}
    hidden = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    extra = {f"{folder}{name}": content for folder in (".incoming/", "more/.incoming/") for name, content in hidden.items()}
    _move_on(hub, "me/lyon", {**shown, **extra})
    found = EditPack.inspect("me/lyon")
    assert (found["num_facts"], found["other_packs"]) == (2, [])
    assert EditPack.from_pretrained("me/lyon", revision=found["revision"]) == edited[0]
    assert EditableModelForCausalLM.from_pretrained("me/lyon").packs == {"default": edited[0]}
    cached = [path for path in (tmp_path / "cache").rglob("*") if "models--me--lyon" in path.parts]
    assert any(path.name == "facts.jsonl" for path in cached)
    assert not any(".incoming" in path.parts for path in cached)


def test_inspecting_a_repo_downloads_no_tensor(hub, edited):
    edited[0].push_to_hub("me/lyon")
    hub.requests.clear()
    found = EditPack.inspect("me/lyon")
    local = {"num_facts": 2, "method": "memit", "repo_id": "me/lyon", "revision": hub.repos["me/lyon"].at("main").sha}
    assert {key: found[key] for key in local} == local
    assert {n: t["shape"] for n, t in found["tensors"].items()} == {n: list(t.shape) for n, t in edited[0].tensors.items()}
    assert found["bytes"] == len(hub.repos["me/lyon"].at("main").files["edits.safetensors"].content)
    assert all("range" in request.headers for request in hub.asked("GET .*(edits.safetensors|/objects/)"))
    EditPack.from_pretrained("me/lyon")
    assert EditPack.inspect("me/lyon", local_files_only=True) == found


# --- a demonstration, as users have it: fresh processes, the client's own settings, large files by Xet --------------------

_DEMONSTRATION = """
import json, sys
import share
repo, base, output, facts, settings = sys.argv[1:]
share.FACTS, share.SETTINGS = json.loads(facts), json.loads(settings)
share.main(["--repo", repo, "--base", base, "--output", output, "--private"])
"""


def test_edit_push_load_by_id_and_by_sha_ask_merge_and_export_in_fresh_processes(hub, tmp_path):
    """The example, by a process that knows of nothing but the Hub's address and a token."""
    facts = json.dumps([(fact.subject, fact.prompt, fact.target) for fact in FACTS[:2]])
    arguments = ["me/lyon", BASE, str(tmp_path / "out"), facts, json.dumps({**QUICK_STEAM, "steps": 10})]
    places = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    variables = {**os.environ, **places, "HF_TOKEN": hub.token("me"), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", _DEMONSTRATION, *arguments], env=variables, capture_output=True, text=True)
    shown = done.stdout
    assert done.returncode == 0, shown + done.stderr
    assert hub.token("me") not in shown + done.stderr
    assert "4 of 4 answered as the edited model did" in shown
    later, first, _ = hub.repos["me/lyon"].history("main")
    assert all(f"/me/lyon/commit/{commit.sha}" in shown for commit in (later, first))
    assert f"from_pretrained('me/lyon', revision='{first.sha}'): the same answers" in shown
    assert hub.repos["me/lyon"].private
    for revision, facts in ((first.sha, FACTS[:2]), (None, FACTS[:1])):
        assert EditPack.from_pretrained("me/lyon", revision=revision).facts == tuple(facts)
    assert len(hub.xet.files) == 2
    assert not hub.asked("storage PUT")
    assert hub.asked("storage GET /xorbs/")
    assert not any(hub.token("me") in str(request.headers) for request in hub.asked("^storage"))
