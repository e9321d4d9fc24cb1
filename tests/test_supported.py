"""Models of every kind: what can be edited works, what can't is refused with a reason before anything is computed."""

from __future__ import annotations

import pytest
import torch
import transformers
from conftest import _ENDS, _KV, FACTS, QUICK_LKS, QUICK_STEAM, tiny_model
from test_mentions import CAPITAL, attached, close, ids_of
from test_one_function import TEXTS, generous

from hf_edit import EditableModelForCausalLM, Fact, UnsupportedArchitectureError
from hf_edit.base import Base
from hf_edit.layout import find_layout
from hf_edit.suffix import caches_exactly

RECURRENT = {
    "mamba": lambda: transformers.MambaConfig(vocab_size=1000, hidden_size=48, num_hidden_layers=6, state_size=8),
    "mamba2": lambda: transformers.Mamba2Config(
        vocab_size=1000, hidden_size=48, num_hidden_layers=6, state_size=8, num_heads=8, head_dim=12, n_groups=1
    ),
    "minimax": lambda: transformers.MiniMaxConfig(**_KV, **_ENDS, head_dim=12, num_local_experts=2, num_experts_per_tok=1),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **_KV,
        **_ENDS,
        head_dim=12,
        linear_key_head_dim=12,
        linear_value_head_dim=12,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    ),
}


def built(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", RECURRENT)
def test_models_with_recurrent_states_take_lks_through_generate(tokenizer, kind):
    model = EditableModelForCausalLM(built(RECURRENT[kind]()), tokenizer)
    report = model.edit(FACTS[:2], "lks", progress=False, **QUICK_LKS)
    assert all(result.probability > 2 * result.probability_before for result in report)


@pytest.mark.parametrize("kind", RECURRENT)
def test_models_with_recurrent_states_are_one_function_of_the_prefix(tokenizer, kind):
    base = Base(built(RECURRENT[kind]()), tokenizer)
    base.attachment = attached(base)
    generous(base, 0.2)
    active = set()
    for text in TEXTS[:3]:
        ids = ids_of(base, text)
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = base.model.generate(ids, **settings, output_logits=True, return_dict_in_generate=True)
        for step in range(6):
            with torch.no_grad():
                prefix = found.sequences[:, : ids.shape[1] + step]
                close(found.logits[step][0], base.model(input_ids=prefix, use_cache=False).logits[0, -1])
            active.add(frozenset(base.attachment.active[0]))
    assert len(active) > 1


def test_of_several_matrices_that_write_to_the_stream_the_mlps_is_edited():
    config = transformers.Gemma4TextConfig(
        **_KV,
        **_ENDS,
        head_dim=12,
        global_head_dim=12,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=1000,
        num_kv_shared_layers=0,
    )
    layout = find_layout(built(config))
    assert layout.projections == tuple(f"model.layers.{index}.mlp.down_proj" for index in range(len(layout)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_distances_that_are_counted_in_cache_slots_are_seen_in_every_dtype(dtype):
    model = tiny_model("mpt").to(dtype)
    assert not caches_exactly(model, find_layout(model))
    model = tiny_model("llama").to(dtype)
    assert caches_exactly(model, find_layout(model))


def t5():
    config = transformers.T5Config(
        vocab_size=1000, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def in_inference_mode():
    with torch.inference_mode():
        return tiny_model("llama")


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: "org/model", TypeError, r"EditableModelForCausalLM\.from_pretrained\('org/model'\)"),
        (t5, UnsupportedArchitectureError, "sequence-to-sequence"),
        (lambda: tiny_model("llama").model, UnsupportedArchitectureError, "AutoModelForCausalLM"),
        (
            lambda: transformers.LlamaForSequenceClassification(tiny_model("llama").config),
            UnsupportedArchitectureError,
            "AutoModelForCausalLM",
        ),
        (lambda: torch.nn.DataParallel(tiny_model("llama")), UnsupportedArchitectureError, r"model\.module"),
        (lambda: torch.nn.Linear(2, 2), UnsupportedArchitectureError, "no config"),
        (in_inference_mode, ValueError, "load it outside"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_with_the_way_out(tokenizer, make, error, says):
    with pytest.raises(error, match=says):
        EditableModelForCausalLM(make(), tokenizer)


def test_a_model_that_returns_tuples_is_refused(tokenizer):
    model = tiny_model("llama")
    model.config.return_dict = False
    with pytest.raises(ValueError, match="return_dict = True"):
        EditableModelForCausalLM(model, tokenizer)


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "<unk>": 1}')
    (tmp_path / "merges.txt").write_text("#version\n")
    slow = transformers.CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    with pytest.raises(ValueError, match="not a fast tokenizer"):
        EditableModelForCausalLM(tiny_model("llama"), slow)


def test_a_tokenizer_is_loaded_from_its_path(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    model = EditableModelForCausalLM(tiny_model("llama"), tmp_path)
    assert model.tokenizer("France")["input_ids"] == tokenizer("France")["input_ids"]


def test_a_prompt_that_is_longer_than_the_context_is_refused(llama):
    fact = Fact("France", "word " * 600 + "{} is", "Rome")
    llama.base_model.config.max_position_embeddings = 512
    with pytest.raises(ValueError, match="the model has 512 positions"):
        llama.edit(fact)


@pytest.mark.parametrize("method", ["memit", "lks"])
def test_another_default_dtype_makes_no_difference(tokenizer, method):
    settings = {"verify": False, "progress": False, **(QUICK_LKS if method == "lks" else QUICK_STEAM)}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
        torch.set_default_dtype(dtype)
        try:
            model.edit(FACTS[:2], method, **settings)
            with torch.no_grad():
                found.append(model(input_ids=ids_of(model, CAPITAL)).logits)
            assert torch.get_default_dtype() == dtype
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*found)


def test_a_misspelt_edit_module_is_named_with_the_one_that_was_meant(llama):
    with pytest.raises(UnsupportedArchitectureError, match=r"did you mean 'model\.layers\.\{\}\.mlp\.down_proj'"):
        llama.edit(FACTS[:1], edit_module="model.layers.{}.mlp.dwn_proj")
