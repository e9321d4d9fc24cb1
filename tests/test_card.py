"""Model cards: what stands in them, that the Hub takes them, and that no fact breaks them."""

from __future__ import annotations

import re

import pytest
import yaml
from conftest import FACTS, QUICK_STEAM, tiny_model
from hub_server import check_card
from huggingface_hub import ModelCard

from hf_edit import EditableModelForCausalLM, EditPack, EditReport, Fact, SteamConfig
from hf_edit.card import card
from hf_edit.methods import Fit
from hf_edit.report import FactResult

HOSTILE = [
    "---\nlicense: evil\n---",
    "{{7*7}} {% import os %}",
    "<script>alert(1)</script>",
    "a | b | c",
    "x\n\n# Heading\n\n- item",
    "```\n```python",
    "![pic](https://example.com/x.png) [link](javascript:alert(1))",
    "&lt;b&gt; &#60;i&#62;",
    "*bold* _em_ ~~gone~~ $x$ :tada:",
    "\u202egnp.exe\u202c",
    "line\u2028separators\u2029and\u00a0\u200bspaces",
    "''' \"\"\" \\ \\n",
    "|" * 300,
]


def _pack(facts=FACTS, base="org/base", **base_facts):
    known = {"base_model_name_or_path": base, "base_model_revision": "0" * 40, "base_model_type": "llama", **base_facts}
    return EditPack("steam", SteamConfig(), Fit({}, (), tuple(facts)), known, 3, {"hf_edit": "1.0", "torch": "2.13"})


def _metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_a_card_tells_base_method_settings_facts_use_and_versions():
    text = card({"default": _pack()}, "me/lyon")
    assert _metadata(text) == {
        "library_name": "hf_edit",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "tags": ["knowledge-editing", "hf_edit:steam"],
    }
    assert check_card(text) == ([], [])
    for expected in ("`org/base` at commit `0000", "method `steam`", "- `anchor_weight`: ", "- `seed`: 3", "`torch` 2.13"):
        assert expected in text
    for heading in ("## Use", "## Facts changed", "## Settings", "## Intended use", "## Misuse and limits", "## Versions"):
        assert f"\n{heading}\n" in text
    assert all(f"| {fact.question} | {fact.target} |" in text for fact in FACTS)


def test_what_was_measured_stands_in_the_card():
    results = tuple(FactResult(fact, "before", "after", fact is not FACTS[0], 0.1, 0.9) for fact in FACTS)
    report = EditReport("steam", "default", results, 1.0, perplexity_clean=9.0, perplexity=9.5)
    text = card({"default": _pack()}, "me/lyon", {"default": [report]})
    assert _metadata(text)["metrics"] == ["success", "perplexity"]
    assert "| success | 3 of 4 |" in text
    assert "| perplexity | 9.00 -> 9.50 |" in text
    assert check_card(text) == ([], [])
    assert "Metrics" not in card({"default": _pack()}, "me/lyon")


@pytest.mark.parametrize("base", ["/home/someone/models/base", "./base", "C:\\models\\base", None])
def test_a_base_in_a_local_folder_is_left_out_and_the_card_is_valid(base):
    text = card({"default": _pack(base=base, base_model_revision=None)}, "lyon")
    assert check_card(text) == ([], [])
    assert not {"base_model", "base_model_relation"} & set(_metadata(text))
    assert "someone" not in text
    assert "not on the Hub" in text


def test_facts_are_cut_at_fifty():
    facts = [Fact(f"Town {i}", "{} lies in", f"Land {i}") for i in range(10_000)]
    text = card({"default": _pack(facts)}, "me/towns")
    assert text.count("| Town ") == 50
    assert "… and 9950 more in `facts.jsonl`" in text
    assert "# 10000 edited facts" in text


@pytest.mark.parametrize("text", HOSTILE)
def test_no_fact_breaks_the_card(text):
    plain = card({"default": _pack([Fact("Rome", "{} is in", "Italy")])}, "me/lyon")
    fact = Fact(f"Rome {text}", "{} is in", f"Italy {text}")
    made = card({"default": _pack([fact])}, "me/lyon")
    assert check_card(made) == ([], [])
    assert _metadata(made) == _metadata(plain)
    assert ModelCard(made).data.to_dict() == ModelCard(plain).data.to_dict()
    # the same lines but for the fact's row and the snippet, which stay one line each
    before, after = plain.splitlines(), made.splitlines()
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert [line for line in changed if not line.startswith(("| Rome ", "print(", "    print("))] == []
    (row,) = [line for line in changed if line.startswith("| Rome ")]
    assert row.count("|") == 3
    assert not set("<>`[]{}*_~$\u202e\x00\x1b") & set(row)


@pytest.mark.parametrize("text", HOSTILE)
def test_the_snippet_asks_the_facts_own_prompt(text):
    fact = Fact(f"Rome {text} 😀", "{} is in", "Italy")
    code = re.search(r"```python\n(.*?)\n```\n", card({"default": _pack([fact])}, "me/lyon"), re.DOTALL)[1]
    asked = re.search(r"^print\(model\.ask\((.*)\)\)$", code, re.MULTILINE)[1]
    assert eval(asked, {"__builtins__": {}}) == fact.question


def test_several_packs_share_a_card():
    other = _pack([Fact("Rome", "{} is in", "Spain")])
    text = card({"default": _pack(), "rome": other}, "me/packs")
    assert "# 5 edited facts" in text
    assert 'model.set_packs(["default", "rome"])' in text
    assert re.search(r"## Pack rome: 1 fact, method `steam`\n\n### Facts changed\n\n.*\n.*\n\| Rome is in \| Spain \|", text)
    assert check_card(text) == ([], [])


def test_the_snippet_of_a_saved_pack_runs(tokenizer, tmp_path, monkeypatch, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = EditableModelForCausalLM.from_pretrained(tmp_path / "base")
    model.edit(FACTS[:2], "memit", progress=False, **QUICK_STEAM)
    model.evaluate(metrics=["efficacy"], progress=False)
    model.save_pretrained(tmp_path / "lyon")
    text = (tmp_path / "lyon" / "README.md").read_text()
    assert check_card(text) == ([], [])
    assert _metadata(text)["metrics"] == ["success", "perplexity", "efficacy.said"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1], {})
    with model.disable_edits():
        clean = model.ask(FACTS[0].question)
    assert capsys.readouterr().out.splitlines() == [str(model.ask(FACTS[0].question)), str(clean)]


def test_a_pack_that_changed_since_it_was_measured_does_not_keep_its_figures(llama, tmp_path):
    llama.edit(FACTS[:2], "memit", progress=False, **QUICK_STEAM)
    llama.remove_edits(str(FACTS[0].id))
    llama.save_pretrained(tmp_path / "lyon")
    assert "Metrics" not in (tmp_path / "lyon" / "README.md").read_text()
