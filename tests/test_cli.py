from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import FACTS, tiny_model

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


def test_methods_are_listed_with_their_settings(capsys):
    assert _run("methods", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steam"]["steps"]["help"]
    assert "epochs" in found["lks"]


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, hf_edit.cli\ntry: hf_edit.cli.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
