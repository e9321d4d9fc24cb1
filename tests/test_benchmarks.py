from __future__ import annotations

import copy
import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import FACTS, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import EditableModelForCausalLM, Fact, LKSConfig, Question
from hf_edit.base import Base
from hf_edit.methods.lks import training
from hf_edit.methods.lks.examples import build_examples
from hf_edit.methods.lks.features import read_features
from hf_edit.methods.lks.generator import make_generator
from hf_edit.suffix import frozen

_FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


@contextmanager
def _benchmark(name):
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", _FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(_FOLDER)  # where a script finds its neighbours
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def steam():
    with _benchmark("steam") as module:
        yield module


@pytest.fixture
def arguments(tokenizer, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    records = [
        {
            "case_id": case,
            "requested_rewrite": {
                "prompt": "The capital of {} is",
                "relation_id": "P36",
                "target_new": {"str": new},
                "target_true": {"str": old},
                "subject": subject,
            },
            "paraphrase_prompts": [f"The capital city of {subject} is"],
            "neighborhood_prompts": ["The capital of Portugal is"],
            "attribute_prompts": ["The capital of Norway is"],
            "generation_prompts": [f"{subject} is", f"{subject} is"],
            "portability": {"New Question": f"Which language is spoken in {subject}'s capital?", "New Answer": "French"},
        }
        for case, (subject, new, old) in enumerate([("France", "Tokyo", "Paris"), ("Spain", "Rome", "Madrid")])
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    quick = ["--set", "statistics_tokens=512", "--set", "contexts=0", "--set", "steps=2", "--set", "tail_factor=0"]
    where = [str(tmp_path / "records.jsonl"), "--model", str(tmp_path / "base"), "--output", str(tmp_path / "out")]
    return [*where, *quick, "--text-tokens", "4"]


def test_a_benchmark_that_was_broken_off_goes_on_where_it_stood(steam, arguments, tmp_path, capsys, monkeypatch):
    run = [*arguments, "--arms", "base,steam"]
    monkeypatch.setattr(steam, "NEAR", 1000)  # a random model recalls nothing
    steam.main(run)
    first = capsys.readouterr().out
    assert "| efficacy.right (2) |" in first
    assert "| metric | steam - base |" in first
    assert "| cosine.centred, middle third (2) |" in first
    finished = tmp_path / "out" / "finished.jsonl"
    lines = finished.read_text().splitlines()
    finished.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])  # broken off in the last line
    computed = []
    group = steam.Benchmark._group
    monkeypatch.setattr(steam.Benchmark, "_group", lambda self, arm, facts: computed.append(arm) or group(self, arm, facts))
    steam.main(run)
    assert computed == ["steam"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["records"] == 2
    assert set(results["rows"]) == {"clean", "base", "steam"}
    computed.clear()
    steam.main([*run, "--set", "steps=3"])
    assert len(computed) == len(lines), "other settings are another run"


def test_controls_are_other_objects_of_the_right_kind(steam, arguments, monkeypatch):
    records = steam.read_records(Path(arguments[0]), None)
    model = steam.EditableModelForCausalLM.from_pretrained(arguments[2])
    anchoring = steam.Anchoring(model, records, steam.SteamConfig(), seed=0)
    monkeypatch.setattr(steam, "score_references", lambda _, pool: [type("Score", (), {"rank": 0})] * len(pool))
    own, held = anchoring.anchors("Tokyo"), anchoring.held_out("Tokyo")
    relations = {r.relation for r in own + held}
    assert own
    assert held
    assert not set(own) & set(held)
    assert {r.object for r in anchoring.wrong("Tokyo")} <= {"Rome", "Madrid"}
    assert relations.isdisjoint(r.relation for r in anchoring.random("Tokyo"))
    assert anchoring.random("Tokyo")
    assert anchoring.random("Tokyo") == anchoring.random("Tokyo")
    assert not any("France" in r.subject or "Spain" in r.subject for r in own + held)


def test_a_variant_of_steam_is_an_arm_of_its_own_beside_the_base(steam, arguments):
    options = steam.parse([*arguments, "--arms", "base", "--variant", 'anchor_weight=1;anchor_frame="raw"'])
    (name,) = options.variants
    assert options.variants[name] == {"anchor_weight": 1, "anchor_frame": "raw"}
    assert options.arms == ["clean", "base", name]
    assert steam.compared(options.arms) == [(name, "base")]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_training_step_of_lks_has_the_loss_and_the_gradient_of_whole_runs_of_the_model(tokenizer, architecture):
    base, config = Base(tiny_model(architecture), tokenizer), LKSConfig(contexts=2, context_length=4)
    blocks, facts = (2, 3, 4), [*FACTS, Fact("Portugal", "The capital of {} is", "Tokyo Rome Berlin")]
    torch.manual_seed(0)
    generator = make_generator(config.generator, base.layout().hidden_size, 32, config.slots, len(blocks))
    for writer in generator.writers:
        torch.nn.init.normal_(writer.out.weight, std=0.2)
    with frozen(base.model), _benchmark("lks_training") as benchmark:
        features = read_features(base, blocks[0], facts, generator.slots)
        made = build_examples(base, facts, config, seed=0)
        codes = training.Codes(features, generator.code_size).requires_grad_(False)
        flat = [*made.prompts, *(e for group in (*made.variations, *made.locality) for e in group)]
        cached = training._Cached(base, blocks, flat, range(len(flat)), config, progress=False)
        losses = [
            cached.loss(range(len(flat)), generator, codes, config)[0],
            benchmark.whole_loss(base, blocks, generator, codes, flat, config),
        ]
        weights = [generator.token_in.weight, *(writer.out.weight for writer in generator.writers)]
        gradients = [torch.autograd.grad(loss, weights) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-3)
    assert all(float(gradient.norm()) > 1e-3 for gradient in gradients[0])


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_the_packs_whose_loading_is_measured_are_packs_that_load(tokenizer, tmp_path, method):
    with _benchmark("loading") as loading:
        tiny_model("llama").save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        loading.make_packs(str(tmp_path / "base"), tmp_path, {"steam": 3, "lks": 5})
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = EditableModelForCausalLM(base, AutoTokenizer.from_pretrained(tmp_path / "base"))
    model.load_pack(tmp_path / method)
    assert model.packs["default"].facts == tuple(loading.facts({"steam": 3, "lks": 5}[method]))


def test_wordings_that_are_measured_are_told_about_no_subject():
    def fact(subject, *rephrases, question):
        asked = Question(f"Where is {subject}{question}", "there")
        return Fact(subject, "The capital of {} is", "Rome", rephrases=rephrases, locality=(asked,))

    facts = [
        fact("France", "{} is ruled from", question="?"),
        fact("Spain", "Spain is Ruled from", "{}'s seat of power is", question="?"),
        fact("Norway", "Norway is ruled from", "{}'s seat of power is", question=" on a map?"),
    ]
    with _benchmark("lks") as lks:
        told = lks.without_wordings(facts, facts[:1])
    assert [f.rephrases for f in told] == [(), ("{}'s seat of power is",), ("{}'s seat of power is",)]
    assert [len(f.locality) for f in told] == [0, 0, 1]


def test_own_prompts_activate_their_facts_on_a_model_and_a_file_of_ones_own(tokenizer, quick_gate, tmp_path, capsys):
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    tiny_model("llama").save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    rows = [
        {
            "subject": fact.subject,
            "prompt": prompt,
            "target": fact.target,
            "rephrase": f"Which city governs {fact.subject}?",
            "loc": f"Who is from {fact.subject}?",
            "loc_ans": "Ann",
        }
        for fact in FACTS
        for prompt in (fact.prompt, "What is {} known for?")
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = [str(tmp_path / "facts.jsonl"), "--model", str(tmp_path / "base"), "--output", str(tmp_path / "out")]
    with _benchmark("own_prompts") as benchmark:
        assert benchmark.main([*where, "--strict"]) == 0
        assert benchmark.main([*where, "--rows", "3", "--quiet", "0.5", "0.99"]) == 0
    assert "not activated" not in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "own_prompts.json").read_text())["rows"]
    active = {row["prompts"]: row["active"] for row in found}
    for name in ("own", "own, blanks after it", "own, in the chat", "own, in the chat, system prompt"):
        assert active[name] == 100
    assert {"paraphrase, in the chat", "same subject, locality", "same subject, other rows' prompts, in the chat"} <= set(
        active
    )
