"""Evaluation by lm_eval's `HFLM`, where it is installed: an edited model is evaluated as it answers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM

pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM


def _requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=0) for pair in arguments]


def _likelihoods(harness):
    found = harness.loglikelihood(_requests("loglikelihood", [(f.question, f" {f.target}") for f in FACTS]), disable_tqdm=True)
    return [likelihood for likelihood, _ in found]


def _expected(model):
    """Log-probability of each fact's target behind its prompt."""
    found = []
    for fact in FACTS:
        prompt, target = (model.tokenizer(text)["input_ids"] for text in (fact.question, f" {fact.target}"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + target])).logits[0]
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(float(rows[range(len(target)), target].sum()))
    return found


@pytest.mark.parametrize(("method", "settings"), [("steam", QUICK_STEAM), ("lks", QUICK_LKS)])
def test_the_harness_measures_the_model_as_it_is_edited(llama, method, settings):
    harness = HFLM(pretrained=llama, tokenizer=llama.tokenizer, batch_size=3)
    clean = _likelihoods(harness)
    llama.edit(FACTS, method, progress=False, verify=False, **settings)

    edited = _likelihoods(harness)
    assert edited == pytest.approx(_expected(llama), abs=1e-3)
    assert sum(edited) - sum(clean) > 4 * math.log(2)
    until = {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
    answers = harness.generate_until(_requests("generate_until", [(f.question, until) for f in FACTS]), disable_tqdm=True)
    assert answers == [answer.split("\n")[0] for answer in llama.ask([f.question for f in FACTS])]

    with llama.disable_edits():
        assert _likelihoods(harness) == pytest.approx(clean, abs=1e-5)


def test_a_whole_evaluation_sees_the_edit(llama, tmp_path):
    """`simple_evaluate` with a task of its own, from a file."""
    choices = [f.target for f in FACTS]
    rows = [{"question": f.question, "choices": choices, "answer": n} for n, f in enumerate(FACTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "edited",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }

    def accuracy():
        harness = HFLM(pretrained=llama, tokenizer=llama.tokenizer, batch_size=2)
        found = lm_eval.simple_evaluate(model=harness, tasks=[ConfigurableTask(config=dict(settings))], bootstrap_iters=0)
        return found["results"]["edited"]["acc,none"]

    clean = accuracy()
    llama.edit(FACTS, "steam", progress=False, verify=False, **QUICK_STEAM)
    assert accuracy() == 1.0 > clean
