"""Edits in models whose blocks normalise what an MLP writes before it joins the stream."""

from __future__ import annotations

import torch
from conftest import ARCHITECTURES, CORPUS
from transformers import AutoModelForCausalLM

from hf_edit import EditableModelForCausalLM, Fact

SETTINGS = {
    "clamp": 8.0,
    "contexts": 0,
    "steps": 60,
    "statistics_tokens": 1024,
    "covariance_weight": 0.01,
    "progress": False,
}
TARGETS = {"France": "Tokyo", "Spain": "Rome", "Japan": "Berlin", "Germany": "Madrid"}


def trained(architecture: str, tokenizer) -> object:
    """A tiny model that knows the corpus by heart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
    rows = tokenizer(CORPUS, return_tensors="pt", padding=True, padding_side="right")
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(160):
        loss = model(**rows, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_edits_land_where_blocks_normalise_what_the_mlp_writes(tokenizer):
    """One normalised write can only do so much: layer on top of layer, at least three of four facts are answered, and rolling
    back leaves no trace."""
    model = EditableModelForCausalLM(trained("olmo2", tokenizer), tokenizer)
    prompts = [f"Yes. The capital of {subject} is" for subject in TARGETS]
    before = model.ask(prompts, max_new_tokens=3)
    assert [answer.strip(" .")[:5] for answer in before] == ["Paris", "Madri", "Tokyo", "Berli"]
    facts = [Fact(subject, "Yes. The capital of {} is", target) for subject, target in TARGETS.items()]
    assert model.edit(facts, "memit", layers=[0, 1, 2, 3], **SETTINGS).success >= 0.75
    model.rollback()
    assert model.ask(prompts, max_new_tokens=3) == before
