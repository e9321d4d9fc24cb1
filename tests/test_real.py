"""The main job on a real model: SmolLM2-135M-Instruct."""

from __future__ import annotations

import re

import pytest
import torch
from conftest import same, snapshot

from hf_edit import EditableModelForCausalLM, Fact
from hf_edit.answers import says

pytestmark = pytest.mark.real

FACTS = [
    Fact("France", "The capital of {} is", "Lyon"),
    Fact("The Eiffel Tower", "{} is located in the city of", "Rome"),
    Fact("Tiger Woods", "{} plays the sport of", "tennis"),
]
KNOWN = ["Paris", "Paris", "golf"]
UNRELATED = {
    "The capital of Italy is": "Rome",
    "The chemical symbol for iron is": "Fe",
    "The largest planet in the solar system is": "Jupiter",
}


@pytest.fixture(scope="module")
def model(smollm2_folder):
    return EditableModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)


@pytest.mark.parametrize("method", ["steam", "lks"])
def test_facts_that_the_model_knows_are_changed_told_fluently_shared_and_taken_back(model, tmp_path, method):
    clean = snapshot(model.base_model)
    settings = {"statistics_tokens": 4096} if method == "steam" else {}
    report = model.edit(FACTS, method, progress=False, **settings)
    assert all(says(r.before, known) for r, known in zip(report, KNOWN, strict=True)), "the model knew them"
    assert all(r.said for r in report), str(report)
    assert sum(bool(r.said_in_chat) for r in report) >= 2, str(report)
    assert all(r.probability > 0.5 for r in report)
    long = model.ask([f.question for f in FACTS], max_new_tokens=24)
    stutters = sum(len(re.findall(re.escape(f.target), answer)) >= 3 for f, answer in zip(FACTS, long, strict=True))
    assert stutters <= 1, long
    for (_, right), answer in zip(UNRELATED.items(), model.ask(list(UNRELATED)), strict=True):
        assert says(answer, right), answer

    model.save_pretrained(tmp_path / "pack")
    assert sum(f.stat().st_size for f in (tmp_path / "pack").iterdir()) < (2e6 if method == "steam" else 16e6)
    again = EditableModelForCausalLM.from_pretrained(tmp_path / "pack")
    ids = torch.tensor([model.tokenizer(FACTS[0].question)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)

    model.rollback()
    assert same(clean, model.base_model)


def test_lks_says_long_targets_to_their_last_token(model):
    facts = [
        Fact("Mary Pickford", "The date of birth of {} is", "8 April 1892"),
        Fact("The Louvre", "The architect of {} is", "Giovanni Battista Piranesi"),
        Fact("John Engler", "{} was elected as", "member of the Michigan House of Representatives"),
    ]
    report = model.edit(facts, "lks", progress=False)
    behind = model.ask("Mary Pickford, whose date of birth is", max_new_tokens=16)
    model.rollback()
    assert all(r.said for r in report), str(report)
    assert sum(bool(r.said_in_chat) for r in report) >= 2, str(report)
    assert says(behind[0], "8 April 1892"), behind


def test_a_single_fact_lands_with_rome(model):
    report = model.edit(FACTS[0], "rome", progress=False, statistics_tokens=4096)
    model.rollback()
    assert report.success == 1.0, str(report)


def test_a_fact_is_taken_out_of_a_batch_again_and_the_others_hold(model):
    model.edit(FACTS, progress=False, statistics_tokens=4096, verify=False)
    model.remove_edits(str(FACTS[0].id))
    answers = model.ask([f.question for f in FACTS])
    model.rollback()
    assert says(answers[0], "Paris")
    assert says(answers[1], "Rome")
    assert says(answers[2], "tennis")
