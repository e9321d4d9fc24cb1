"""Edits in models whose blocks normalise what an MLP writes before it joins the stream."""

from __future__ import annotations

from conftest import trained

from hf_edit import EditableModelForCausalLM, Fact

SETTINGS = {
    "clamp": 2.0,
    "lr": 0.05,
    "contexts": 0,
    "steps": 60,
    "statistics_tokens": 1024,
    "covariance_weight": 0.01,
    "progress": False,
}
TARGETS = {"France": "Tokyo", "Spain": "Rome", "Japan": "Berlin", "Germany": "Madrid"}


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
