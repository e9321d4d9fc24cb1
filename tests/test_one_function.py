"""The contract: the logits after a token depend on the tokens up to there alone, in whatever way an edited model is run."""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import CACHE, TEMPLATE, tiny_model
from test_mentions import CAPITAL, EARLIER, always, attached, close, ids_of
from transformers import DynamicCache, StaticCache

from hf_edit.base import Base
from hf_edit.kv_cache import cache_of
from hf_edit.positions import pad

KINDS = [
    *((name, "states") for name in ("llama", "gptj", "gpt2", "mistral", "bloom", "gemma3", "olmo2")),
    ("llama", "weights"),
    ("gpt2", "weights"),
    ("bloom", "weights"),
]
# Texts with mentions that come and go: names within names, questions after them, targets said and said again, turns of a chat.
TEXTS = [
    CAPITAL + " Rome, we think. The capital of France is",
    EARLIER + " many. France and Spain",
    "What is the capital of France? It is Rome. Oslo",
    "Nobody is here",
    "France Francesca Spain's Spaniard France",
    "<s>What is the capital of France?<s> Rome is in France.<s>The capital of Spain is<s> Oslo. Spain",
]


@pytest.fixture(params=KINDS, ids="-".join)
def edited(request, tokenizer):
    """A model with an edit whose gate is generous, so that facts come and go."""
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>", pad_token="<s>")
    own.chat_template = TEMPLATE
    base = Base(tiny_model(request.param[0]), own)
    base.model.generation_config.eos_token_id = None
    base.attachment = attached(base, kind=request.param[1], finishes=True)
    return base


def generous(base, threshold):
    routing = base.attachment.edit.decider.routing
    routing.gate = replace(routing.gate, threshold=torch.tensor([threshold]))


def takes_positions(base):
    return "bloom" not in type(base.model).__name__.lower()


def alone(base, ids):
    """The contract's own words: each token's logits from a run of the tokens up to it, and of nothing else."""
    with torch.no_grad():
        rows = [base.model(input_ids=ids[:, : n + 1], use_cache=False).logits[0, -1] for n in range(ids.shape[1])]
    return torch.stack(rows)


def fed(base, ids, sizes, cache):
    """The logits of a text that is fed in pieces over a cache."""
    found, done = [], 0
    with torch.no_grad():
        for piece in ids.split(sizes, dim=1):
            places = {"position_ids": torch.arange(done, done + piece.shape[1])[None]} if takes_positions(base) else {}
            out = base.model(input_ids=piece, **{CACHE: cache}, use_cache=True, **places)
            cache, done = cache_of(out), done + piece.shape[1]
            found.append(out.logits[0])
            assert cache.get_seq_length() == done
    return torch.cat(found)


def pieces(total, rng):
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(rng.choice((1, 1, 2, 3, 7)), total - sum(sizes)))
    return sizes


@pytest.mark.parametrize("threshold", [0.97, 0.2], ids=["some", "most"])
def test_every_way_of_running_a_text_gives_each_prefix_its_own_logits(edited, threshold):
    generous(edited, threshold)
    rng = random.Random(threshold)
    for text in TEXTS:
        ids = ids_of(edited, text)
        expected = alone(edited, ids)
        with torch.no_grad():
            close(edited.model(input_ids=ids, use_cache=False).logits[0], expected)
        close(fed(edited, ids, 1, DynamicCache()), expected)
        close(fed(edited, ids, pieces(ids.shape[1], rng), DynamicCache()), expected)
        if takes_positions(edited):
            cache = StaticCache(config=edited.model.config, max_cache_len=128)
            close(fed(edited, ids, pieces(ids.shape[1], rng), cache), expected)


def test_the_facts_come_and_go_within_the_texts(edited):
    """The test above tests something: facts are active after some tokens, and not after others."""
    for threshold, least in ((0.97, 2), (0.2, 4)):
        generous(edited, threshold)
        changes = []
        for text in TEXTS:
            ids = ids_of(edited, text)
            seen = []
            for n in range(ids.shape[1]):
                with torch.no_grad():
                    edited.model(input_ids=ids[:, : n + 1], use_cache=False)
                seen.append(frozenset(edited.attachment.active[0]))
            changes.append(sum(one != other for one, other in pairwise(seen)))
        assert sum(n > 0 for n in changes) >= least, changes


@pytest.mark.parametrize("architecture", ["gemma3", "mistral"])
def test_a_window_that_slides_over_the_text_changes_nothing(tokenizer, architecture):
    """It forgets tokens, so a run that needs other writes begins at the first one again."""
    base = Base(tiny_model(architecture, sliding_window=6), tokenizer)
    base.attachment = attached(base)
    for threshold in (0.97, 0.2):
        generous(base, threshold)
        for text in TEXTS[:3]:
            ids = ids_of(base, text)
            assert ids.shape[1] > 6
            expected = alone(base, ids)
            for sizes in (1, [4, 1, 1, ids.shape[1] - 6], ids.shape[1]):
                close(fed(base, ids, sizes, DynamicCache(config=base.model.config)), expected)


@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_drafted_tokens_are_kept_or_dropped_by_the_edited_model(edited, how):
    generous(edited, 0.2)
    drafts = {"assistant_model": tiny_model("llama")} if how == "assistant" else {"prompt_lookup_num_tokens": 3}
    for text in TEXTS[:3]:
        ids = ids_of(edited, text)
        usual = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        plain = edited.model.generate(ids, **usual)
        assert torch.equal(edited.model.generate(ids, **usual, **drafts), plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_what_each_is_alone(edited, side):
    generous(edited, 0.97)
    rows = [edited.tokenizer(text)["input_ids"] for text in TEXTS]
    ids, mask = pad(rows, side)
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes_positions(edited) else {}
    expected = [alone(edited, ids_of(edited, text)) for text in TEXTS]
    for cached in (False, True):
        with torch.no_grad():
            logits = edited.model(input_ids=ids, attention_mask=mask, use_cache=cached, **places).logits
        for row, each in enumerate(expected):
            close(logits[row][mask[row].bool()], each)


def test_a_padded_batch_goes_on_token_by_token_as_each_row_does_alone(edited):
    generous(edited, 0.97)
    rows = [edited.tokenizer(text)["input_ids"] for text in TEXTS]
    length = min(map(len, rows))
    begun = [row[: max(1, len(row) - length + 1)] for row in rows]
    rest = torch.tensor([row[-(length - 1) :] for row in rows])
    ids, mask = pad(begun, "left")
    found = []
    with torch.no_grad():
        places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if takes_positions(edited) else {}
        out = edited.model(input_ids=ids, attention_mask=mask, use_cache=True, **places)
        found.append(out.logits[:, -1])
        for token in rest.T[:-1]:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            places = {"position_ids": mask.sum(1, keepdim=True) - 1} if takes_positions(edited) else {}
            out = edited.model(input_ids=token[:, None], attention_mask=mask, **{CACHE: cache_of(out)}, **places)
            found.append(out.logits[:, -1])
    for row, text in enumerate(TEXTS):
        expected = alone(edited, ids_of(edited, text))[len(begun[row]) - 1 : -1]
        close(torch.stack(found)[:, row], expected)


def test_a_cache_that_was_copied_and_repeated_goes_on_for_each_row(edited):
    if "gemma3" in type(edited.model).__name__.lower() or "mistral" in type(edited.model).__name__.lower():
        pytest.skip("rows of a window are repeated in the same way")
    generous(edited, 0.97)
    start, rest = ids_of(edited, "We know that the capital of France"), [" is", " was"]
    with torch.no_grad():
        cache = copy.deepcopy(cache_of(edited.model(input_ids=start, use_cache=True)))
        cache.batch_repeat_interleave(2)
        new = torch.tensor([edited.tokenizer(text)["input_ids"][:1] for text in rest])
        logits = edited.model(input_ids=new, **{CACHE: cache}, use_cache=True).logits[:, -1]
    assert cache.get_seq_length() == start.shape[1] + 1
    for row in range(2):
        close(logits[row], alone(edited, torch.cat([start, new[row : row + 1]], dim=1))[-1])


def test_rows_of_a_cache_may_be_reordered_and_taken_out(edited):
    if getattr(edited.model.config, "sliding_window", None):
        pytest.skip("a window does not keep the keys by which its rows are told apart")
    generous(edited, -1.0)
    one, other = (ids_of(edited, f"We know that the capital of {name}")[:, :14] for name in ("France", "Spain"))
    rest = ids_of(edited, " is the capital of France is")
    for rows in ([1, 0], [1], [0, 1, 1]):
        with torch.no_grad():
            cache = cache_of(edited.model(input_ids=torch.cat([one, other])))
            cache.batch_select_indices(torch.tensor(rows))
            logits = edited.model(input_ids=rest.repeat(len(rows), 1), **{CACHE: cache}).logits
        for found, row in zip(logits, rows, strict=True):
            close(found, alone(edited, torch.cat([(one, other)[row], rest], dim=1))[14:])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["Jose", "Zoe"], "Is Jose\u0301 here, Zoe?"),
        (["राम", "सीता"], "राम और सीता"),
        (["北京", "北京大学"], "我在北京大学学习。北京很大"),
        (["서울", "부산"], "서울은 크다. 부산에서"),
    ],
)
def test_names_whose_characters_take_several_tokens_are_found_alike_by_every_prefix(tokenizer, names, text):
    base = Base(tiny_model("llama"), tokenizer)
    always(base, [0, 3], names=names)
    ids = ids_of(base, text)
    with torch.no_grad():
        close(base.model(input_ids=ids, use_cache=False).logits[0], alone(base, ids))
    close(fed(base, ids, 1, DynamicCache()), alone(base, ids))


def test_positions_that_do_not_begin_at_zero_are_kept_when_tokens_run_again(tokenizer):
    base = Base(tiny_model("gpt2"), tokenizer)
    base.attachment = attached(base)
    generous(base, 0.2)
    ids = ids_of(base, TEXTS[0])
    places = torch.arange(ids.shape[1])[None] + 7
    with torch.no_grad():
        expected = base.model(input_ids=ids, position_ids=places, use_cache=False).logits[0]
        found, cache = [], DynamicCache()
        for piece, where in zip(ids.split(4, 1), places.split(4, 1), strict=True):
            found.append(base.model(input_ids=piece, position_ids=where, **{CACHE: cache}).logits[0])
    close(torch.cat(found), expected)


def test_hidden_states_are_put_together_like_the_logits(edited):
    generous(edited, 0.97)
    ids = ids_of(edited, TEXTS[0])
    with torch.no_grad():
        whole = edited.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        for n in (3, 7, ids.shape[1] - 1):
            part = edited.model(input_ids=ids[:, : n + 1], output_hidden_states=True, use_cache=False)
            for one, other in zip(whole.hidden_states, part.hidden_states, strict=True):
                close(one[0, n], other[0, n])


def test_labels_make_no_difference_to_the_logits(edited):
    ids = ids_of(edited, CAPITAL + " Rome, we think")
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        close(edited.model(input_ids=ids, labels=labels).logits, edited.model(input_ids=ids).logits)


def test_a_text_without_mentions_runs_once_and_one_that_asks_for_a_fact_twice(edited):
    runs = []
    counting = edited.layout().blocks[0].register_forward_hook(lambda *_: runs.append(1))
    for text, expected in (("Nobody is here", 1), (CAPITAL, 2), (CAPITAL + " big and old", 2)):
        runs.clear()
        with torch.no_grad():
            edited.model(input_ids=ids_of(edited, text), use_cache=False)
        assert len(runs) == expected, text
    counting.remove()
