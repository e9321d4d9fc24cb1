"""LKS: what is in scope, and that every way of running the model rewrites the same states."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import CACHE, QUICK_LKS, tiny_model
from transformers import DynamicCache, StaticCache

from hf_edit import EditableModelForCausalLM, Fact
from hf_edit.kv_cache import cache_of
from hf_edit.methods.lks.generator import make_generator
from hf_edit.positions import pad
from hf_edit.scope import Scope, mentions_in_tokens

FACTS = [
    Fact("New York City", "The mayor of {} is", "Rome"),
    Fact("Yo-Yo Ma", "{} plays the", "Paris"),
    Fact("Ann", "{} is in", "Tokyo"),
]
PROMPTS = [
    "New York City is where Yo-Yo Ma lives with",
    "Who is Ann? She",
    "Nobody of that name is here, and",
    "Ann, Ann and Yo-Yo Ma's",
]


def _found(names, text):
    return [(text[m.start : m.end], m.entity) for m in Scope(names).find(text)]


@pytest.mark.parametrize(
    ("names", "text", "found"),
    [
        ([["Ann"], ["Annapolis"]], "Ann went to Annapolis; Anna did not", [("Ann", 0), ("Annapolis", 1)]),
        ([["New York"], ["New York City"]], "New York City, New York", [("New York City", 1), ("New York", 0)]),
        ([["France"]], "France's capital, in FRANCE and in france.", [("France", 0), ("FRANCE", 0), ("france", 0)]),
        ([["US"]], "The US and us", [("US", 0)]),
        ([["France", "Frankreich"]], "Frankreich", [("Frankreich", 0)]),
        ([["東京"]], "私は東京に住む", [("東京", 0)]),
        ([["a.*b"], ["(x"]], "a.*b or aXXb or (x", [("a.*b", 0), ("(x", 1)]),
        ([["İstanbul"]], "in İstanbul today", [("İstanbul", 0)]),
        ([["Rome"]], "Jerome, Romeo and chrome", []),
        ([["Rome"]], "Rome's, Rome’s, Rome-based (Rome) ROME_2", [("Rome", 0)] * 4),
        ([["O'Brien"], ["Don"]], "O’Brien and Don; don't, Don't, Don’t", [("O’Brien", 0), ("Don", 1)]),
        ([["James"]], "James' house and James’s", [("James", 0), ("James", 0)]),
        ([["Renee"]], "Rene\u0301e, Renee\u0301 and Renee", [("Renee", 0)]),
        ([["Renée"]], "Rene\u0301e is RENE\u0301E", [("Rene\u0301e", 0), ("RENE\u0301E", 0)]),
        ([["Rene\u0301e"]], "so Renée", [("Renée", 0)]),
        ([["Москва"]], "Москва и МОСКВА, не Москвачка", [("Москва", 0), ("МОСКВА", 0)]),
        ([["ΟΔΥΣΣΕΥΣ"]], "ο Οδυσσευς", [("Οδυσσευς", 0)]),
        ([["القاهرة"]], "في القاهرة، والقاهرة", [("القاهرة", 0)]),
        ([["กรุงเทพ"]], "ฉันอยู่กรุงเทพมานาน", [("กรุงเทพ", 0)]),
        ([["กา"]], "กาแฟและกาำ", [("กา", 0)]),
        ([["アン"]], "アンナとアンは", [("アン", 0)]),
        ([["フランス"]], "フランス語", [("フランス", 0)]),
        ([["北京"], ["北京大学"]], "北京大学在北京。", [("北京大学", 1), ("北京", 0)]),
        ([["프랑스"]], "프랑스의 수도, 프랑스에서, 프랑스인", [("프랑스", 0), ("프랑스", 0)]),
        ([["서울"]], "\u1109\u1165\u110b\u116e\u11af은", [("\u1109\u1165\u110b\u116e\u11af", 0)]),
        ([["New York"]], "New\nYork and New\u00a0York", [("New\nYork", 0), ("New\u00a0York", 0)]),
        ([["Jean-Luc Moreau"]], "Jean‑Luc Moreau", [("Jean‑Luc Moreau", 0)]),
        ([], "anything", []),
    ],
)
def test_every_longest_whole_word_mention_is_found_and_nothing_else(names, text, found):
    assert _found(names, text) == found


def test_the_right_ones_of_ten_thousand_names_are_found():
    scope = Scope([[f"Person Number{n}"] for n in range(10_000)])
    assert [m.entity for m in scope.find("Yesterday Person Number77 met Person Number9999.")] == [77, 9999]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in Reykjavik and Rekyjavik's", [("Reykjavik", 0), ("Rekyjavik", 0)]),
        ("Reykjavk, Reykkjavik, Reykjavic", [("Reykjavk", 0), ("Reykkjavik", 0), ("Reykjavic", 0)]),
        ("Teykjavik, Reykjavicc, Reyk javic", []),
        ("Lyndon Johnson met Lyndon Johnston and Lyndon Johnsson", [("Lyndon Johnson", 1), ("Lyndon Johnston", 2)]),
        ("Apollo 12 flew, and Apollo 11", [("Apollo 11", 3)]),
        ("Lyon and Lyom", [("Lyon", 4)]),
    ],
)
def test_a_strict_second_stage_finds_one_typing_mistake_and_no_other_name(text, found):
    names = [["Reykjavik"], ["Lyndon Johnson"], ["Lyndon Johnston"], ["Apollo 11"], ["Lyon"]]
    assert [(text[m.start : m.end], m.entity) for m in Scope(names, fuzzy=True).find(text)] == found


def test_mentions_are_found_in_token_sequences_that_no_tokenizer_would_choose(tokenizer):
    scope = Scope([["Ann"]])
    usual = tokenizer("so Ann is")["input_ids"]
    bytewise = [
        tokenizer.convert_tokens_to_ids(c)
        for c in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("so Ann is")[0][0]
    ]
    bytewise += [tokenizer.convert_tokens_to_ids(c) for c in "ĠAnnĠis"]
    assert None not in bytewise
    for ids in (usual, bytewise):
        ((last, entity),) = mentions_in_tokens(tokenizer, scope, ids)
        assert entity == 0
        assert tokenizer.decode(ids[: last + 1]) == "so Ann"


@pytest.mark.parametrize("form", ["context", "residual"])
def test_an_untrained_generator_changes_nothing(form):
    generator = make_generator(form, hidden=8, width=16, slots=3, writes=2)
    states = torch.randn(5, 8)
    for write in range(2):
        assert torch.equal(generator(generator.encode(torch.randn(5, 3, 8)), states, write), states)


@pytest.mark.parametrize("form", ["linear", "mlp"])
def test_the_released_forms_overwrite_whatever_stood_there(form):
    generator = make_generator(form, hidden=8, width=16, slots=3, writes=1)
    codes = generator.encode(torch.randn(5, 1, 8))
    assert torch.equal(generator(codes, torch.randn(5, 8)), generator(codes, torch.randn(5, 8)))


@pytest.fixture(params=["llama", "gptj", "gpt2"])  # gptj: blocks that return tuples
def edited(request, tokenizer):
    """An edited tiny model whose generator is strong, so that a missed mention shows."""
    model = EditableModelForCausalLM(tiny_model(request.param), tokenizer)
    model.edit(FACTS, "lks", progress=False, verify=False, **QUICK_LKS)
    return model


def _single(model, prompt):
    """The logits of a prompt run alone, whole, without a cache."""
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0]


def _greedy_without_cache(model, prompt, length):
    ids = model.tokenizer(prompt)["input_ids"]
    for _ in range(length):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids


def test_edits_reach_prompts_that_mention_them_and_no_others(edited):
    with edited.disable_edits():
        clean = [_single(edited, p) for p in PROMPTS]
    for prompt, before in zip(PROMPTS, clean, strict=True):
        assert torch.equal(before, _single(edited, prompt)) == prompt.startswith("Nobody")


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_with_padding_on_either_side_equal_single_prompts(edited, side):
    rows = [edited.tokenizer(p)["input_ids"] for p in PROMPTS]
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = edited(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits[row][mask[row].bool()], _single(edited, prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[1, 2, 3], [4], [2, 1, 1, 1]])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunked_prefill_with_any_cache_equals_the_whole_prompt(edited, chunks, kind):
    ids = torch.tensor([edited.tokenizer(PROMPTS[3])["input_ids"]])
    pieces = ids.split([*chunks, ids.shape[1] - sum(chunks)], dim=1)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=edited.config, max_cache_len=64)
    found, done = [], 0
    with torch.no_grad():
        for piece in pieces:
            positions = torch.arange(done, done + piece.shape[1])[None]
            out = edited(input_ids=piece, **{CACHE: cache}, use_cache=True, position_ids=positions)
            found.append(out.logits[0])
            done += piece.shape[1]
    torch.testing.assert_close(torch.cat(found), _single(edited, PROMPTS[3]), atol=1e-4, rtol=1e-4)


def test_left_padded_cached_generation_equals_uncached_single_prompts(edited):
    rows = [edited.tokenizer(p)["input_ids"] for p in PROMPTS]
    ids, mask = pad(rows, "left")
    out = edited.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    for row, prompt in enumerate(PROMPTS):
        edited.generation_config.eos_token_id = None
        assert out[row][mask.shape[1] - len(rows[row]) :].tolist() == _greedy_without_cache(edited, prompt, 6)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prefill_chunk_size": 2}, {"cache_implementation": "static"}])
def test_generation_with_beams_chunks_and_static_caches_equals_that_without_a_cache(edited, settings):
    edited.generation_config.eos_token_id = None
    ids = torch.tensor([edited.tokenizer(PROMPTS[3])["input_ids"]])
    shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    shared["disable_compile"] = True
    uncached = {"use_cache": False, **({"num_beams": 3} if "num_beams" in settings else {})}
    assert edited.generate(**shared, **settings).tolist() == edited.generate(**shared, **uncached).tolist()


def test_a_conversation_that_continues_a_cache_is_edited_across_its_turns(edited):
    """The mention is split over two calls: its first tokens are in the cache, its last comes with the next."""
    ids = torch.tensor([edited.tokenizer("We met Yo-Yo Ma today")["input_ids"]])
    cut = next(i for i in range(ids.shape[1]) if "Yo-" in edited.tokenizer.decode(ids[0, :i]))
    with torch.no_grad():
        first = edited(input_ids=ids[:, :cut], use_cache=True)
        second = edited(input_ids=ids[:, cut:], **{CACHE: cache_of(first)}, use_cache=True)
    logits = torch.cat([first.logits[0], second.logits[0]])
    torch.testing.assert_close(logits, _single(edited, "We met Yo-Yo Ma today"), atol=1e-4, rtol=1e-4)


def test_mentions_that_the_model_itself_generates_are_edited(edited, monkeypatch):
    """The model is forced to write an entity's name; what comes next must be what the whole text gives."""
    start = edited.tokenizer("We met")["input_ids"]
    whole = edited.tokenizer("We met Yo-Yo Ma today")["input_ids"]
    assert whole[: len(start)] == start
    forced = whole[len(start) :]

    def force(input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, forced[input_ids.shape[1] - len(start)]] = 0.0
        return scores

    out = edited.generate(
        input_ids=torch.tensor([start]),
        attention_mask=torch.ones(1, len(start), dtype=torch.long),
        max_new_tokens=len(forced),
        logits_processor=[force],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.cat(out.logits)
    expected = _single(edited, "We met Yo-Yo Ma today")[len(start) - 1 : -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with edited.disable_edits():
        assert not torch.allclose(_single(edited, "We met Yo-Yo Ma today")[len(whole) - 2], expected[-1], atol=1e-3)


def test_taking_a_fact_out_leaves_the_others_as_they_were(edited):
    before = _single(edited, PROMPTS[1])
    edited.remove_edits(str(FACTS[0].id))
    assert torch.equal(before, _single(edited, PROMPTS[1]))
    edited.remove_edits(str(FACTS[2].id))
    with edited.disable_edits():
        clean = _single(edited, PROMPTS[1])
    assert torch.equal(clean, _single(edited, PROMPTS[1]))


def test_a_subject_that_is_no_word_of_its_own_is_refused_with_the_way_out(tokenizer):
    model = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    with pytest.raises(ValueError, match="method='steam'"):
        model.edit(Fact("Franc", "The capital of {}e is", "Rome"), "lks", progress=False, **QUICK_LKS)


def test_a_copy_of_an_edited_model_keeps_its_edits_whatever_becomes_of_the_original(llama):
    llama.edit(FACTS, "lks", progress=False, verify=False, **QUICK_LKS)
    before = _single(llama, PROMPTS[0])
    twin = copy.deepcopy(llama)
    llama.rollback()
    clean = _single(llama, PROMPTS[0])
    assert torch.equal(_single(twin, PROMPTS[0]), before)
    twin.rollback()
    assert torch.equal(_single(twin, PROMPTS[0]), clean)


def test_nothing_of_lks_stays_on_the_model_after_rollback(edited):
    edited.rollback()
    base = edited.get_base_model()
    assert "prepare_inputs_for_generation" not in base.__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
