from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import FACTS, tiny_model
from hub_server import HubServer, pointed_at
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import EditableModelForCausalLM, EditPack
from hf_edit.cli import main


@pytest.fixture
def base(tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _run(*arguments):
    return main([str(a) for a in arguments])


def test_facts_from_a_file_become_a_pack_that_is_asked_and_inspected(base, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(f.to_dict()) + "\n" for f in FACTS[:2]))
    quick = ["--set", "statistics_tokens=512", "--set", "contexts=0", "--set", "steps=3", "--set", "anchor_weight=0"]
    assert _run("edit", base, facts, "--output", tmp_path / "pack", *quick, "--json") == 0
    assert [r["target"] for r in json.loads(capsys.readouterr().out)["results"]] == [f.target for f in FACTS[:2]]
    assert _run("ask", tmp_path / "pack", FACTS[0].question, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) == {"prompt", "before", "after"}
    assert _run("inspect", tmp_path / "pack") == 0
    assert "2 facts by steam" in capsys.readouterr().out


def test_a_packs_edits_are_evaluated_and_so_are_facts_on_a_plain_model(base, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(f.to_dict()) + "\n" for f in FACTS[:2]))
    quick = ["--set", "statistics_tokens=512", "--set", "contexts=0", "--set", "steps=3", "--set", "anchor_weight=0"]
    assert _run("edit", base, facts, "--output", tmp_path / "pack", *quick) == 0
    capsys.readouterr()
    assert _run("evaluate", tmp_path / "pack", "--mode", "both", "--metric", "efficacy", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["target"] for row in found["rows"]] == [f.target for f in FACTS[:2]]
    assert set(found["summary"]) == {"efficacy.right", "efficacy.nll", "efficacy.said"}
    assert _run("evaluate", base, facts) == 0
    assert "efficacy.said" in capsys.readouterr().out
    assert _run("evaluate", base) == 1
    assert "pass the facts" in capsys.readouterr().err


def test_mistakes_end_in_one_line_and_a_failing_exit_code(base, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"subject": "a"}')
    assert _run("edit", base, facts, "--output", tmp_path / "pack") == 1
    error = capsys.readouterr().err
    assert error.startswith("hf-edit: ")
    assert "prompt" in error
    assert "Traceback" not in error
    assert _run("inspect", tmp_path / "nothing") == 1
    facts.write_text(json.dumps(FACTS[0].to_dict()))
    assert _run("edit", base, facts, "--output", tmp_path / "pack", "--set", "stepps=3") == 1
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert not (tmp_path / "pack").exists()


def test_a_question_is_asked_in_the_chat_where_the_model_has_a_template(base, tmp_path, capsys):
    assert _run("ask", base, "Hello", "--chat") == 1
    assert "no chat template" in capsys.readouterr().err
    chatty = shutil.copytree(base, tmp_path / "chatty")
    (chatty / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert _run("ask", chatty, "The capital of France is", "--chat", "--json", "--max-new-tokens", "4") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["before"] == row["after"]


def test_methods_are_listed_with_their_settings(capsys):
    assert _run("methods", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steam"]["steps"]["help"]
    assert "epochs" in found["lks"]


QUICK = ["--set", "statistics_tokens=512", "--set", "contexts=0", "--set", "steps=3", "--set", "anchor_weight=0"]


@pytest.fixture
def pack(base, tmp_path, capsys):
    """The folder of a pack of two facts, made by the command line."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(f.to_dict()) + "\n" for f in FACTS[:2]))
    assert _run("edit", base, facts, "--output", tmp_path / "pack", *QUICK) == 0
    capsys.readouterr()
    return tmp_path / "pack"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with HubServer() as server, pointed_at(server, tmp_path / "cache", monkeypatch):
        monkeypatch.setenv("HF_TOKEN", server.token("me"))
        yield server


def test_a_merged_pack_is_a_plain_model_that_answers_as_the_edited_one(pack, tmp_path, capsys):
    assert _run("merge", pack, "--output", tmp_path / "plain", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(tmp_path / "plain")}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    edited = EditableModelForCausalLM.from_pretrained(pack)
    ids = torch.tensor([edited.tokenizer(FACTS[0].question)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, edited(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").get_vocab() == edited.tokenizer.get_vocab()
    assert _run("merge", tmp_path / "base", "--output", tmp_path / "again") == 1
    assert "nothing to merge" in capsys.readouterr().err


def test_an_adapter_is_what_the_pack_exports(pack, tmp_path, capsys):
    assert _run("export-peft", pack, "--output", tmp_path / "adapter") == 0
    assert str(tmp_path / "adapter") in capsys.readouterr().out
    EditPack.from_pretrained(pack).export_peft(tmp_path / "same")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "adapter" / name).stat().st_size == (tmp_path / "same" / name).stat().st_size
    assert _run("export-peft", pack, "--output", pack) == 1
    assert "folder of its own" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pack_is_pushed_with_its_card_and_inspected_on_the_hub(pack, hub, capsys):
    card = (pack / "README.md").read_text()
    (pack / "README.md").write_text(card + "\nA word of mine.\n")
    arguments = ["--private", "--message", "Two facts", "--description", "For a test.", "--tag", "mine", "--json"]
    assert _run("push", pack, "me/lyon", *arguments) == 0
    pushed = json.loads(capsys.readouterr().out)
    commit = hub.repos["me/lyon"].at("main")
    assert (pushed["repo_id"], pushed["commit"]) == ("me/lyon", commit.sha)
    assert (commit.title, commit.description) == ("Two facts", "For a test.")
    shared = commit.files["README.md"].content.decode()
    assert "A word of mine." in shared
    assert "- mine\n" in shared
    assert 'from_pretrained("me/lyon")' in shared
    assert hub.repos["me/lyon"].private
    assert _run("inspect", "me/lyon", "--json") == 0
    assert json.loads(capsys.readouterr().out)["revision"] == commit.sha
    assert _run("inspect", "me/lyon", "--revision", "v9") == 1
    assert "no revision 'v9'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_pushing_a_folder_whose_card_is_a_link_uploads_nothing(pack, hub, tmp_path, capsys):
    (tmp_path / "token").write_text("hf_secret")
    (pack / "README.md").unlink()
    (pack / "README.md").symlink_to(tmp_path / "token")
    assert _run("push", pack, "me/lyon") == 1
    assert "README.md is a link out of the pack" in capsys.readouterr().err
    assert "me/lyon" not in hub.repos


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_pushing_to_others_and_from_nowhere_is_told(pack, hub, tmp_path, capsys):
    hub.add("you/lyon", {"README.md": b"yours"})
    assert _run("push", pack, "you/lyon") == 1
    assert "create_pr=True" in capsys.readouterr().err
    assert _run("push", pack, "you/lyon", "--create-pr") == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/you/lyon/discussions/1"
    for folder in (tmp_path / "nothing", tmp_path / "base"):
        assert _run("push", folder, "me/lyon") == 1
        assert str(folder) in capsys.readouterr().err


def test_where_nothing_can_be_written_is_told_before_the_work(pack, tmp_path, capsys):
    facts = tmp_path / "facts.jsonl"
    for command in (["edit", tmp_path / "no-model", facts], ["merge", tmp_path / "no-pack"], ["export-peft", tmp_path / "no"]):
        assert _run(*command, "--output", facts) == 1
        assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_traceback_is_shown_on_demand_only(how, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_EDIT_DEBUG", "1" if how == "variable" else "0")
    debug = ["--debug"] if how == "option" else []
    assert _run("inspect", tmp_path / "nothing", *debug) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("hf-edit: there is no folder")


def test_wrong_arguments_exit_with_two(capsys):
    for arguments in ([], ["nonsense"], ["ask"], ["edit", "a", "b"]):
        with pytest.raises(SystemExit) as exited:
            _run(*arguments)
        assert exited.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "edit", "ask", "evaluate", "inspect", "merge", "push", "export-peft", "methods"])
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as exited:
        _run(*command.split(), "--help")
    assert exited.value.code == 0
    assert "--json" in capsys.readouterr().out or not command


def test_a_reader_who_leaves_early_gets_no_traceback():
    code = "import sys, hf_edit.cli; sys.exit(hf_edit.cli.main(['methods']))"
    run = subprocess.run(f'"{sys.executable}" -c "{code}" | head -n 1', shell=True, capture_output=True, text=True)
    assert run.stdout
    assert run.stderr == ""


def test_it_is_an_extension_of_the_hubs_command_line(tmp_path):
    folder = tmp_path / ".local/share/hf/extensions/hf-edit"
    folder.mkdir(parents=True)
    executable = folder / "hf-edit"
    executable.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hf_edit "$@"\n')
    executable.chmod(0o755)
    manifest = {"owner": "someone", "repo": "hf-edit", "repo_id": "someone/hf-edit", "short_name": "edit", "type": "python"}
    manifest |= {"executable_path": str(executable), "installed_at": "2026-01-01T00:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    hf = [sys.executable, "-m", "huggingface_hub.cli.hf", "edit"]
    helped = subprocess.run([*hf, "--help"], env=environment, capture_output=True, text=True)
    assert helped.returncode == 0, helped.stderr
    assert "export-peft" in helped.stdout
    failed = subprocess.run([*hf, "push", "nothing", "me/x"], env=environment, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.endswith("hf-edit: there is no folder nothing\n")


def test_help_takes_less_than_half_a_second():
    resource = pytest.importorskip("resource")
    command = [sys.executable, "-m", "hf_edit", "--help"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # of a processor, however busy it is


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, hf_edit.cli\ntry: hf_edit.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_model_is_loaded_in_the_dtype_and_on_the_device_that_are_given(base, capsys, monkeypatch):
    seen = []
    asked = EditableModelForCausalLM.ask

    def ask(model, *args, **kwargs):
        seen.append((model.dtype, model.device.type))
        return asked(model, *args, **kwargs)

    monkeypatch.setattr(EditableModelForCausalLM, "ask", ask)
    assert _run("ask", base, "The capital", "--dtype", "bfloat16", "--device", "cpu") == 0
    assert _run("ask", base, "The capital", "--device-map", "auto") == 0
    assert set(seen) == {(torch.bfloat16, "cpu"), (torch.float32, "cpu")}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--dtype", "__class__"], "invalid choice: '__class__'"),
        (["--device", "gpu"], "there is no device 'gpu' here, as cuda, cuda:1"),
        (["--device", "cpu", "--device-map", "auto"], "not allowed with argument"),
    ],
)
def test_what_is_no_dtype_or_device_is_a_mistake_of_the_command_line(base, capsys, given, says):
    with pytest.raises(SystemExit) as ended:
        _run("ask", base, "The capital", *given)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_said(base, capsys):
    with pytest.raises(SystemExit):
        _run("ask", base, "The capital", "--device", "cuda")
    assert "there is no device 'cuda' here" in capsys.readouterr().err


def test_a_model_in_a_subfolder_is_loaded_with_its_tokenizer(base):
    model = EditableModelForCausalLM.from_pretrained(base.parent, subfolder="base")
    assert model.tokenizer("France")["input_ids"]
