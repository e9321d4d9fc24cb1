"""The model's perplexity on text of its own."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from hf_edit import health
from hf_edit.base import Base
from hf_edit.health import Health, own_text


@pytest.fixture
def base(tokenizer, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_EDIT_CACHE", str(tmp_path))
    return Base(tiny_model("llama"), tokenizer)


def test_own_text_is_sampled_once_a_model(base, monkeypatch):
    rows = own_text(base)
    monkeypatch.setattr(health, "sample_freely", None)
    assert own_text(base) == rows
    with pytest.raises(TypeError):
        own_text(Base(tiny_model("gpt2"), base.tokenizer))


def test_perplexity_is_that_of_the_models_own_loss_and_rises_when_weights_are_damaged(base):
    rows = torch.tensor(own_text(base))
    with torch.no_grad():
        loss = base.model(input_ids=rows, labels=rows).loss
    found = Health(base)
    assert found.clean == pytest.approx(float(loss.exp()), rel=1e-4)
    assert found.now() == found.clean
    with torch.no_grad():
        weight = base.model.get_submodule("model.layers.2.mlp.down_proj").weight
        weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    assert found.now() > 1.02 * found.clean
