from __future__ import annotations

import pytest
import torch
from conftest import POST_NORM, tiny_model

from hf_edit import UnsupportedArchitectureError
from hf_edit.layout import find_layout, weight_shape, write_scale


def test_blocks_and_mlp_output_projections_are_found_by_structure(architecture):
    model = tiny_model(architecture)
    layout = find_layout(model)
    assert len(layout) == 6
    for index in range(6):
        module = model.get_submodule(layout.projection(index))
        assert weight_shape(module)[0] == layout.hidden_size == 48
        assert weight_shape(module)[1] > 48


def test_what_the_mlp_writes_is_known_to_be_added_or_normalised_first(architecture):
    model = tiny_model(architecture)
    scale = write_scale(model, find_layout(model), 2)
    if architecture in POST_NORM:
        assert scale is None
    else:
        assert scale == pytest.approx(0.5 if architecture == "granite" else 1.0, rel=1e-3)


def test_a_users_module_name_overrides_the_search():
    model = tiny_model("llama")
    layout = find_layout(model, "model.layers.{}.self_attn.o_proj")
    assert layout.projection(1) == "model.layers.1.self_attn.o_proj"


def test_a_model_without_such_a_projection_is_refused_with_the_way_out():
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                           intermediate_size=32, num_local_experts=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedArchitectureError, match=r"edit_module='model\.layers\.\{\}"):
        find_layout(model).projection(0)


def test_relative_depths_cover_the_model():
    layout = find_layout(tiny_model("llama"))
    assert [layout.at_depth(d) for d in (0.0, 0.5, 1.0)] == [0, 2, 5]
    with pytest.raises(ValueError, match="blocks 0 to 5"):
        layout.block(6)
    assert isinstance(layout.blocks[0], torch.nn.Module)
