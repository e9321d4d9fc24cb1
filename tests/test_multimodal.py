"""Multimodal classes: edits act on the text of a prompt, beside a picture or without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from conftest import CACHE, FACTS, QUICK_LKS, QUICK_STEAM
from test_mentions import CAPITAL, EARLIER, attached, close, ids_of
from test_one_function import generous
from transformers import DynamicCache

from hf_edit import EditableModelForCausalLM
from hf_edit.base import Base
from hf_edit.kv_cache import cache_of

PICTURE = 990  # the token that a picture's embeddings take the place of
TEXT: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MROPE: dict[str, Any] = {**TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}
EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
QWEN_EYE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": PICTURE,
    "video_token_id": 989,
    "vision_start_token_id": 991,
    "vision_end_token_id": 992,
}


@dataclass(frozen=True)
class Kind:
    """A class, and a picture as it takes one.

    Attributes:
        config: makes its configuration.
        picture: the tokens that stand for the picture.
        inputs: makes what goes with them.
        types: the argument that tells a picture's tokens from others, if it takes one.
    """

    config: Callable[[], Any]
    picture: list[int]
    inputs: Callable[[], dict[str, torch.Tensor]]
    types: str | None = None

    def with_picture(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The inputs for a picture with a text behind it."""
        torch.manual_seed(1)
        ids = torch.cat([torch.tensor([self.picture]), ids], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.inputs()}
        return inputs | ({self.types: (ids == PICTURE).int()} if self.types else {})


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def patches() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(16, 384), "image_grid_thw": torch.tensor([[1, 4, 4]])}


FRAMED = [991, PICTURE, PICTURE, PICTURE, PICTURE, 992]
KINDS = {
    "gemma3": Kind(
        lambda: transformers.Gemma3Config(
            text_config={**TEXT, "sliding_window": 128},
            vision_config=EYE,
            mm_tokens_per_image=4,
            image_token_index=PICTURE,
            boi_token_index=991,
            eoi_token_index=992,
        ),
        FRAMED,
        pixels,
        "token_type_ids",
    ),
    "llava": Kind(
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**EYE),
            image_token_id=PICTURE,
        ),
        [PICTURE] * 16,
        pixels,
    ),
    "mistral3": Kind(
        lambda: transformers.Mistral3Config(
            text_config=transformers.MistralConfig(**TEXT),
            vision_config=transformers.PixtralVisionConfig(**EYE),
            image_token_id=PICTURE,
            spatial_merge_size=2,
        ),
        [PICTURE] * 4,
        lambda: {**pixels(), "image_sizes": torch.tensor([[32, 32]])},
    ),
    "qwen2_5_vl": Kind(
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=MROPE,
            vision_config={**QWEN_EYE, "depth": 2, "window_size": 32, "fullatt_block_indexes": [1]},
            **QWEN_IDS,
        ),
        FRAMED,
        patches,
        "mm_token_type_ids",
    ),
    "qwen3_vl": Kind(
        lambda: transformers.Qwen3VLConfig(
            text_config=MROPE,
            vision_config={**QWEN_EYE, "depth": 3, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **QWEN_IDS,
        ),
        FRAMED,
        patches,
        "mm_token_type_ids",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


def tiny(kind: Kind) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(kind.config()).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture
def edited(kind, tokenizer) -> Base:
    """A model with an edit whose gate is generous."""
    base = Base(tiny(kind), tokenizer)
    base.attachment = attached(base)
    generous(base, 0.2)
    return base


@pytest.mark.parametrize("how", ["steam", "gate", "lks"])
def test_an_edit_acts_on_the_text_with_a_picture_and_without(kind, tokenizer, how, quick_gate):
    model = EditableModelForCausalLM(tiny(kind), tokenizer)
    plain = {"input_ids": ids_of(model, FACTS[0].question)}
    prompts = plain, kind.with_picture(plain["input_ids"])
    with torch.no_grad():
        clean = [model(**prompt).logits for prompt in prompts]
    if how == "lks":
        report = model.edit(FACTS[:2], "lks", progress=False, **QUICK_LKS)
    else:
        gate = {"gate": True} if how == "gate" else {}
        report = model.edit(FACTS[:2], "steam", progress=False, **QUICK_STEAM, **gate)
    assert sum(r.probability > r.probability_before for r in report) >= 1
    with torch.no_grad():
        now = [model(**prompt).logits for prompt in prompts]
        assert all(not torch.allclose(one[0, -1], other[0, -1], atol=1e-2) for one, other in zip(now, clean, strict=True))
        model.rollback()
        assert all(torch.equal(model(**prompt).logits, logits) for prompt, logits in zip(prompts, clean, strict=True))


def test_a_text_is_one_function_of_its_prefixes(edited):
    for text in (CAPITAL + " Rome, we think. The capital of France is", EARLIER + " many. France and Spain"):
        ids = ids_of(edited, text)
        with torch.no_grad():
            alone = [edited.model(input_ids=ids[:, : n + 1], use_cache=False).logits[0, -1] for n in range(ids.shape[1])]
            close(edited.model(input_ids=ids, use_cache=False).logits[0], torch.stack(alone))
            cache, found, done = DynamicCache(config=edited.model.config.get_text_config()), [], 0
            for piece in ids.split([5, 1, 1, ids.shape[1] - 7], dim=1):
                places = torch.arange(done, done + piece.shape[1])[None]
                out = edited.model(input_ids=piece, position_ids=places, **{CACHE: cache}, use_cache=True)
                cache, done = cache_of(out), done + piece.shape[1]
                found.append(out.logits[0])
        close(torch.cat(found), torch.stack(alone))


def test_a_text_behind_a_picture_is_one_function_of_its_prefixes(edited, kind):
    ids = ids_of(edited, CAPITAL + " Rome, we think. The capital of France is")
    with torch.no_grad():
        whole = edited.model(**kind.with_picture(ids), use_cache=False).logits[0]
        for n in range(ids.shape[1]):
            part = edited.model(**kind.with_picture(ids[:, : n + 1]), use_cache=False).logits[0]
            close(whole[: len(part)], part)


def test_what_is_generated_behind_a_picture_is_what_each_prefix_says(edited, kind):
    """Facts come and go meanwhile, so that the picture is run again."""
    active = set()
    for text in (CAPITAL, "We know that the capital of France is Rome. The capital of Spain is"):
        ids = ids_of(edited, text)
        settings = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        found = edited.model.generate(**kind.with_picture(ids), **settings)
        said = found.sequences[:, -10:]
        for step in range(10):
            with torch.no_grad():
                prefix = kind.with_picture(torch.cat([ids, said[:, :step]], dim=1))
                close(found.logits[step][0], edited.model(**prefix, use_cache=False).logits[0, -1])
            active.add(frozenset(edited.attachment.active[0]))
    assert len(active) > 1


def test_beams_behind_a_picture_are_scored_as_whole_texts_are(edited, kind):
    ids = ids_of(edited, CAPITAL)
    settings = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "do_sample": False, "length_penalty": 0.0}
    found = edited.model.generate(**kind.with_picture(ids), **settings, output_scores=True, return_dict_in_generate=True)
    for said, score in zip(found.sequences[:, -8:], found.sequences_scores, strict=True):
        with torch.no_grad():
            logits = edited.model(**kind.with_picture(torch.cat([ids, said[None]], dim=1)), use_cache=False).logits[0]
        close(logits[-9:-1].log_softmax(-1).gather(1, said[:, None]).sum(), score)


def test_embeddings_alone_are_said_not_to_be_edited(edited):
    ids = ids_of(edited, CAPITAL)
    embeddings = edited.model.get_input_embeddings()(ids)
    with torch.no_grad(), pytest.warns(UserWarning, match="pass input_ids"):
        found = edited.model(inputs_embeds=embeddings).logits
    edited.attachment.detach()
    with torch.no_grad():
        close(found, edited.model(inputs_embeds=embeddings).logits)
