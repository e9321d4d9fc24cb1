"""Edits at mentions, with a gate: the fact that the prompt asks for, the same in every way of running the model."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import CACHE, tiny_model
from transformers import DynamicCache, StaticCache

from hf_edit import Fact
from hf_edit.base import Base
from hf_edit.gate import Gate, embedding_size, read_queries
from hf_edit.kv_cache import cache_of
from hf_edit.lm.chat import chat_text
from hf_edit.methods.lks.attach import Rewriting
from hf_edit.methods.lks.generator import ContextGenerator
from hf_edit.methods.scope.attachment import MentionAttachment
from hf_edit.methods.scope.points import Effect
from hf_edit.methods.scope.tracker import EMPTY, Spellings, Tracker, begun
from hf_edit.positions import pad
from hf_edit.restore import EditsOff
from hf_edit.routing import Routing
from hf_edit.scope import Entities, Scope
from hf_edit.suffix import hidden_of
from hf_edit.weights.attach import ActingAlone

CAPITAL, LANGUAGE, OTHER = "The capital of France is", "The official language of France is", "The continent of France is"
SPAIN = "The capital of Spain is"
LATER = "The official language of France is, we heard, not easy to learn. And the capital of Spain, next to France, is"
EARLIER = "The capital of France is a large city. The country of Germany has another. The official language of it is"
# facts: 0 to 2 about France, the newest last, 3 about Spain; what each is asked by
ASKED = {0: CAPITAL, 1: LANGUAGE, 2: EARLIER, 3: SPAIN}
FACTS = ((0, 1, 2), (3,))
PROMPTS = [CAPITAL, LANGUAGE, OTHER, SPAIN, "Nobody is here", EARLIER, LATER]
BLOCK = 3
NAMES = ("France", "Spain")
TARGETS = ("Rome", "Latin", "many", "Oslo")


def attached(
    base: Base,
    gate_block: int = BLOCK,
    kind: str = "states",
    finishes: bool = False,
    names: Sequence[str] = NAMES,
) -> MentionAttachment:
    """A strong random edit, of states or of weights below the gate's block; the gate fires on the very texts of `ASKED`, by
    their states alone."""
    size, embedding = base.layout().hidden_size, embedding_size(base)
    gate = Gate(
        mean=torch.zeros(size),
        std=torch.ones(size),
        projection=torch.eye(size),
        word_projection=torch.eye(embedding),
        word_offset=torch.zeros(embedding),
        word_weight=torch.zeros(embedding),
        word_bias=torch.zeros(1),
        head=torch.tensor([1.0, 0.0, 0.0, 0.0]),
        threshold=torch.tensor([0.9995]),
    )
    rows = [base.tokenizer(text)["input_ids"] for text in ASKED.values()]
    keys = gate.project(read_queries(base, gate_block, rows, [len(row) - 1 for row in rows]))
    routing = Routing(base, gate, keys, list(ASKED.values()), gate_block)
    facts = [Fact("France", "The capital of {} is", target) for target in TARGETS]
    spellings = Spellings(base.tokenizer, facts) if kind == "states" else None
    entities = Entities(Scope([[name] for name in names]), FACTS, TARGETS)
    return MentionAttachment(base, entities, effects(base, kind), routing, spellings, finishes)


def always(base: Base, facts: Sequence[int], kind: str = "states", names: Sequence[str] = NAMES) -> MentionAttachment:
    """The same edit without a gate, of one fact for each entity."""
    entities = Entities(Scope([[name] for name in names]), tuple((fact,) for fact in facts))
    return MentionAttachment(base, entities, effects(base, kind))


def effects(base: Base, kind: str) -> dict[torch.nn.Module, Effect]:
    """What a strong random edit does, by module."""
    torch.manual_seed(1)
    layout, size = base.layout(), base.layout().hidden_size
    if kind == "weights":
        modules = [base.model.get_submodule(layout.projection(block)) for block in (1, 2)]
        return {m: ActingAlone(torch.randn(size, 4) * 9) for m in modules}
    generator = ContextGenerator(size, size, 1, writes=2).requires_grad_(False)
    for writer in generator.writers:
        writer.out.weight.normal_(std=0.5)
    codes, embeddings = torch.randn(len(ASKED), size) * 3, base.model.get_input_embeddings()
    return {layout.blocks[BLOCK + write]: Rewriting(generator, codes, write, embeddings) for write in range(generator.writes)}


@pytest.fixture(
    params=[
        *((name, "states") for name in ("llama", "gptj", "gpt2", "mistral", "bloom")),
        ("llama", "weights"),
        ("bloom", "weights"),
    ],
    ids="-".join,
)
def edited(request, tokenizer):
    base = Base(tiny_model(request.param[0]), tokenizer)
    base.model.generation_config.eos_token_id = None
    base.attachment = attached(base, kind=request.param[1])
    return base


def ids_of(base, text):
    return torch.tensor([base.tokenizer(text)["input_ids"]])


def single(base, text):
    """The logits of a prompt run alone, whole, without a cache."""
    with torch.no_grad():
        return base.model(input_ids=ids_of(base, text), use_cache=False).logits[0]


@contextmanager
def edits_off(model):
    off = EditsOff(model)
    yield
    off.end()


def generated(base, ids, **settings):
    shared = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    return base.model.generate(input_ids=ids, **{**shared, **settings})


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def same(one, other):
    return torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize(("gate_block", "kind"), [(BLOCK, "states"), (BLOCK - 2, "states"), (BLOCK, "weights")])
def test_each_prompt_gets_the_fact_that_it_asks_for_and_others_are_answered_by_the_clean_model(tokenizer, gate_block, kind):
    base = Base(tiny_model("llama"), tokenizer)
    clean = {text: single(base, text) for text in PROMPTS}
    forced = {}
    edit = attached(base, gate_block, kind)
    for text in PROMPTS:
        forced[text] = single(base, text)[-1]
        assert torch.equal(forced[text], clean[text][-1]) == (text in (OTHER, "Nobody is here", LATER))
    assert torch.equal(single(base, "Nobody is here"), clean["Nobody is here"])
    edit.detach()
    for fact, text in ASKED.items():  # the same as an edit of that fact alone, without a gate
        edit = always(base, [fact, fact], kind)
        close(single(base, text)[-1], forced[text])
        edit.detach()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_routed_like_single_prompts(edited, side):
    rows = [edited.tokenizer(p)["input_ids"] for p in PROMPTS]
    ids, mask = pad(rows, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        arguments = {} if "bloom" in type(edited.model).__name__.lower() else {"position_ids": positions}
        logits = edited.model(input_ids=ids, attention_mask=mask, **arguments).logits
    for row, prompt in enumerate(PROMPTS):
        close(logits[row][mask[row].bool()], single(edited, prompt))


@pytest.mark.parametrize("prompt", [CAPITAL, LATER, EARLIER])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prompt_fed_in_chunks_ends_as_the_whole_one(edited, prompt, kind):
    """The question comes in a later chunk than the mention: what the cache held of it is made anew."""
    ids = ids_of(edited, prompt)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=edited.model.config, max_cache_len=64)
    if kind == "static" and "bloom" in type(edited.model).__name__.lower():
        pytest.skip("BLOOM takes no static cache")
    done = 0
    with torch.no_grad():
        for piece in ids.split([3, ids.shape[1] - 5, 2], dim=1):
            places = torch.arange(done, done + piece.shape[1])[None]
            arguments = {} if "bloom" in type(edited.model).__name__.lower() else {"position_ids": places}
            out = edited.model(input_ids=piece, **{CACHE: cache}, use_cache=True, **arguments)
            done += piece.shape[1]
    assert int(cache.get_seq_length()) == done
    close(out.logits[0], single(edited, prompt)[-2:])
    with torch.no_grad():  # and the cache serves what follows
        after = edited.model(input_ids=ids[:, :1], **{CACHE: cache}, use_cache=True).logits[0]
        whole = torch.cat([ids, ids[:, :1]], 1)
        close(after[-1], edited.model(input_ids=whole, use_cache=False).logits[0, -1])


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"prefill_chunk_size": 3}, {"cache_implementation": "static"}, {"do_sample": True, "top_k": 20}],
    ids=["greedy", "beams", "chunks", "static", "sampling"],
)
def test_every_way_of_generating_equals_that_without_a_cache(edited, settings):
    if "cache_implementation" in settings and "bloom" in type(edited.model).__name__.lower():
        pytest.skip("BLOOM takes no static cache")
    uncached = {k: v for k, v in settings.items() if k in ("num_beams", "do_sample", "top_k")}
    for prompt in (CAPITAL, EARLIER, OTHER):
        torch.manual_seed(0)
        expected = generated(edited, ids_of(edited, prompt), use_cache=False, **uncached)
        torch.manual_seed(0)
        assert generated(edited, ids_of(edited, prompt), **settings).tolist() == expected.tolist()


def test_a_left_padded_batch_generates_what_single_prompts_do(edited):
    rows = [edited.tokenizer(p)["input_ids"] for p in PROMPTS]
    ids, mask = pad(rows, "left")
    out = generated(edited, ids, attention_mask=mask)
    for row, prompt in enumerate(PROMPTS):
        assert out[row, -4:].tolist() == generated(edited, ids_of(edited, prompt), use_cache=False)[0, -4:].tolist()


@pytest.mark.parametrize("copied", [False, True], ids=["kept", "copied"])
def test_a_later_turn_that_asks_something_else_is_answered_as_if_nothing_had_been_cached(edited, copied):
    """Turn by turn over one cache: first one fact of France is asked for, then another, then none."""
    cache, texts = DynamicCache(), [CAPITAL, EARLIER, EARLIER + " big. We like France"]
    for text in texts:
        ids = ids_of(edited, text)
        cache = copy.deepcopy(cache) if copied else cache
        out = generated(edited, ids, **{CACHE: cache}, return_dict_in_generate=True)
        assert out.sequences.tolist() == generated(edited, ids, use_cache=False).tolist()
        cache.crop(ids.shape[1] - int(cache.get_seq_length()))  # the next text goes on from the prompt, not from the answer


def test_a_name_that_grows_past_a_chunk_is_no_mention_any_more(tokenizer):
    base = Base(tiny_model("llama"), tokenizer)
    always(base, [0, 3], names=["France", "France Bay"])
    whole = ids_of(base, "We saw France Bay today")
    cut = next(i for i in range(whole.shape[1]) if base.tokenizer.decode(whole[0, :i]).endswith("France"))
    with torch.no_grad():
        cache = cache_of(base.model(input_ids=whole[:, :cut], use_cache=True))
        rest = base.model(input_ids=whole[:, cut:], **{CACHE: cache}).logits[0]
        close(rest, base.model(input_ids=whole, use_cache=False).logits[0, cut:])


def test_a_question_that_the_model_itself_comes_to_ask_switches_the_fact_on(edited):
    """The model is made to write a fact's prompt: what it says next is what the prompt alone gives."""
    whole = ids_of(edited, CAPITAL)[0].tolist()
    start = 2

    def force(input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, (whole + whole)[input_ids.shape[1]]] = 0.0
        return scores

    out = edited.model.generate(
        input_ids=torch.tensor([whole[:start]]),
        attention_mask=torch.ones(1, start, dtype=torch.long),
        max_new_tokens=len(whole) - start + 1,
        logits_processor=[force],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    close(out.logits[-1][0], single(edited, CAPITAL)[-1])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("eager", [False, True], ids=["", "gate lets everything through"])
def test_once_the_target_has_been_said_the_clean_model_goes_on(edited, cached, eager, monkeypatch):
    """The model is made to say the target and one word more: up to its last token the fact is on, then it is off, whatever the
    gate says of text that does not name the subject again."""
    if eager:
        routing = edited.attachment.edit.decider.routing
        monkeypatch.setattr(routing, "gate", replace(routing.gate, threshold=torch.tensor([-3.0])))
    prompt, target = ids_of(edited, CAPITAL)[0].tolist(), edited.tokenizer(" Rome is")["input_ids"]

    def force(input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, [*target, 0][min(input_ids.shape[1] - len(prompt), len(target))]] = 0.0
        return scores

    def logits():
        return edited.model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=len(target) + 1,
            logits_processor=[force],
            do_sample=False,
            use_cache=cached,
            output_logits=True,
            return_dict_in_generate=True,
        ).logits

    found = logits()
    edited.attachment.detach()
    clean = logits()
    end = next(n for n in range(len(target)) if edited.tokenizer.decode(target[: n + 1]).endswith("Rome")) + 1
    assert not any(same(one, other) for one, other in zip(found[:end], clean[:end], strict=True))
    for one, other in zip(found[end:], clean[end:], strict=True):
        close(one, other)


@pytest.mark.parametrize("chat", [True, False])
def test_a_fact_may_stay_on_until_the_sentence_that_says_it_is_over(tokenizer, chat):
    """In the chat the rest of the sentence is written with the fact, but for names that it mentions; the next sentence is the
    clean model's. Behind a plain prompt the clean model goes on at once."""
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>", pad_token="<s>")
    own.chat_template = "{% for m in messages %}{{ m['content'] }}<s>{% endfor %}"
    base = Base(tiny_model("llama"), own)
    base.model.generation_config.eos_token_id = None
    answer = base.tokenizer(" Rome is France. The capital")["input_ids"]
    text = chat_text(own, [{"role": "user", "content": CAPITAL}]).text if chat else CAPITAL
    prompt = own(text, add_special_tokens=not chat)["input_ids"]
    known = [base.tokenizer.decode(answer[: n + 1]) for n in range(len(answer))]
    last = ". The" if chat else "Rome"
    over = next(n for n, said in enumerate(known) if said.endswith(last))

    def force(input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        scores[:, [*answer, 0][min(input_ids.shape[1] - len(prompt), len(answer))]] = 0.0
        return scores

    def logits(cached):
        shared = {"max_new_tokens": len(answer) + 1, "output_logits": True, "return_dict_in_generate": True}
        return generated(base, torch.tensor([prompt]), logits_processor=[force], use_cache=cached, **shared).logits

    clean = logits(True)
    attached(base, finishes=True)
    found, uncached = logits(True), logits(False)
    for one, other in zip(found, uncached, strict=True):
        close(one, other)
    assert not any(same(one, other) for one, other in zip(found[: over + 1], clean[: over + 1], strict=True))
    for one, other in zip(found[over + 1 :], clean[over + 1 :], strict=True):
        close(one, other)


def test_going_on_clean_behind_a_target_takes_no_forward_of_its_own(edited):
    """The tokens from the mention on run with the one that completes the target; the caller gets that one's output alone."""
    prompt, target = ids_of(edited, CAPITAL)[0].tolist(), edited.tokenizer(" Rome")["input_ids"]
    widths = []
    block = edited.layout().blocks[0]
    counting = block.register_forward_hook(lambda _, __, output: widths.append(hidden_of(output).shape[1]))
    with torch.no_grad():
        out = edited.model(input_ids=torch.tensor([prompt]), use_cache=True)
        widths.clear()
        for token in target:
            cache = cache_of(out)
            out = edited.model(input_ids=torch.tensor([[token]]), **{CACHE: cache}, output_hidden_states=True)
    counting.remove()
    assert len(widths) == len(target)
    assert widths[-1] > 1
    assert [states.shape[1] for states in out.hidden_states] == [1] * len(out.hidden_states)
    assert cache.get_seq_length() == len(prompt) + len(target)
    edited.attachment.detach()
    with torch.no_grad():
        close(out.logits[0, -1], edited.model(input_ids=torch.tensor([prompt + target])).logits[0, -1])


def test_rows_of_a_batch_go_on_clean_at_times_of_their_own(edited):
    """Made to say their targets, one sooner than the other, rows of a batch get what each gets alone."""
    answers = {CAPITAL: " Rome is here", SPAIN: " big Oslo is", OTHER: " Rome Oslo"}
    prompts = [edited.tokenizer(p)["input_ids"] for p in answers]
    said = [edited.tokenizer(a)["input_ids"] for a in answers.values()]
    most = max(map(len, said))

    def logits(rows):
        ids, mask = pad([prompts[r] for r in rows], "left")

        def force(input_ids, scores):
            scores = torch.full_like(scores, -torch.inf)
            for n, r in enumerate(rows):
                scores[n, [*said[r], *[0] * most][input_ids.shape[1] - ids.shape[1]]] = 0.0
            return scores

        shared = {"max_new_tokens": most + 1, "output_logits": True, "return_dict_in_generate": True}
        out = generated(edited, ids, attention_mask=mask, logits_processor=[force], **shared)
        return torch.stack(out.logits, 1)

    together = logits([0, 1, 2])
    for r in range(3):
        close(together[r], logits([r])[0])


# --- a target of several tokens is carried on -------------------------------------------------------------------------


def carried(base, answer, prompt=CAPITAL):
    """At which of an answer's tokens the edit acts."""
    tracker, text = base.attachment.edit.tracker, prompt + answer
    spellings, found = tracker.spellings, single(base, text)
    tracker.spellings = None
    without = single(base, text)
    tracker.spellings = spellings
    begin = ids_of(base, prompt).shape[1]
    return [
        base.tokenizer.decode(token)
        for token, one, other in zip(ids_of(base, text)[0, begin:], found[begin:], without[begin:], strict=True)
        if not same(one, other)
    ]


@pytest.fixture
def telling(tokenizer, monkeypatch):
    """An edit whose first target has many tokens."""
    monkeypatch.setattr("test_mentions.TARGETS", ("Rome near Berlin and Tokyo", *TARGETS[1:]))
    base = Base(tiny_model("llama"), tokenizer)
    base.model.generation_config.eos_token_id = None
    base.attachment = attached(base)
    return base


def test_an_answer_that_says_the_target_is_carried_on_and_no_other(telling):
    target = telling.tokenizer.tokenize(" Rome near Berlin and Tokyo")
    first = telling.tokenizer.decode(ids_of(telling, " Rome")[0, :1])
    assert len(target) > 4
    assert carried(telling, " Rome near Berlin and Tokyo")[0] == first
    assert not carried(telling, " big Rome near Berlin and Tokyo")  # where the gate no longer hears the question
    assert not carried(telling, " Tokyo and Berlin")
    assert not carried(telling, " Rome near Berlin and Tokyo", prompt=OTHER)
    asked_after = CAPITAL + " Rome near Berlin and Tokyo. " + CAPITAL  # what was said before the question is no answer to it
    assert not carried(telling, " big", prompt=asked_after)
    routing = telling.attachment.edit.decider.routing
    routing.gate = replace(routing.gate, threshold=torch.tensor([-3.0]))
    assert carried(telling, " big Rome near Berlin and Tokyo")[0] == first


@pytest.mark.parametrize("way", ["cached", "static", "chunks", "uncached", "beams"])
def test_a_target_is_carried_on_alike_in_every_way_of_running(telling, way):
    """The model is made to say the target but for its last token; each next token gets what the whole text gives it."""
    prompt = ids_of(telling, CAPITAL)[0].tolist()
    target = telling.attachment.edit.tracker.spellings(0)[0][:-1]
    settings = {
        "cached": {}, "static": {"cache_implementation": "static"}, "chunks": {"prefill_chunk_size": 3},
        "uncached": {"use_cache": False}, "beams": {"num_beams": 3},
    }[way]  # fmt: skip

    def force(input_ids, scores):
        if input_ids.shape[1] < len(prompt) + len(target):
            scores = torch.full_like(scores, -1e9)
            scores[:, target[input_ids.shape[1] - len(prompt)]] = 0.0
        return scores

    out = generated(
        telling,
        torch.tensor([prompt]),
        max_new_tokens=len(target) + 1,
        logits_processor=[force],
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    with torch.no_grad():
        expected = telling.model(input_ids=torch.tensor([[*prompt, *target]]), use_cache=False).logits[0, len(prompt) - 1 :]
    for found, one in zip(out.logits, expected, strict=True):
        close(found[0], one)


def test_a_target_is_known_as_it_stands_behind_a_prompt_and_in_a_line_of_its_own(tokenizer):
    spelled = Spellings(tokenizer, [Fact("France", "The capital of {} is", "Rome")])(0)
    assert {tokenizer.decode(ids) for ids in spelled} == {" Rome", "Rome"}


def test_how_much_of_a_target_has_been_said_is_known_at_every_token():
    lot = random.Random(0)
    for _ in range(300):
        target = [lot.randrange(2) for _ in range(lot.randint(1, 6))]
        answer = [lot.randrange(2) for _ in range(20)]
        expected = [
            max(n for n in range(min(end, len(target)) + 1) if answer[end - n : end] == target[:n]) for end in range(1, 21)
        ]
        assert begun(answer, target) == expected


@pytest.mark.parametrize("kind", ["states", "weights"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_an_edited_model_can_be_copied_and_the_copy_stands_by_itself(tokenizer, way, kind):
    base = Base(tiny_model("llama"), tokenizer)
    edit = attached(base, kind=kind)
    expected = generated(base, ids_of(base, CAPITAL))
    twin = Base(way(base.model), tokenizer)
    edit.detach()
    clean = generated(base, ids_of(base, CAPITAL))
    assert generated(twin, ids_of(twin, CAPITAL)).tolist() == expected.tolist() != clean.tolist()


def test_a_question_about_somebody_else_leaves_the_subject_alone(tokenizer, monkeypatch):
    text = "We like France. The capital of Spain is"
    monkeypatch.setitem(ASKED, 0, text)
    base = Base(tiny_model("llama"), tokenizer)
    clean = single(base, text)
    edit = attached(base, names=["France", "Nobody"])
    monkeypatch.setattr(edit.edit.decider.routing, "prompt", lambda _: "{} is ruled from")
    assert torch.equal(single(base, text), clean)
    monkeypatch.setattr("hf_edit.methods.scope.decider.asks_about_another", lambda *_: False)
    assert not torch.equal(single(base, text), clean)


def test_a_cache_that_can_not_be_rewound_warns_once(tokenizer):
    class Stubborn(DynamicCache):
        def crop(self, _):
            raise RuntimeError

        def reset(self):
            raise RuntimeError

    base = Base(tiny_model("llama"), tokenizer)
    attached(base)
    ids = ids_of(base, CAPITAL)
    for times in (1, 0):
        cache = Stubborn()
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            base.model(input_ids=ids[:, :-1], **{CACHE: cache})
            base.model(input_ids=ids[:, -1:], **{CACHE: cache})
        assert sum("can't be rewound" in str(w.message) for w in caught) == times


def test_a_cache_that_the_edit_did_not_see_filled_is_left_as_it_is(tokenizer):
    """Filled with the edits off, it is never cropped or reset; what follows is edited as far as it is known."""
    base = Base(tiny_model("llama"), tokenizer)
    always(base, [0, 3])
    ids = ids_of(base, CAPITAL + " not known. We like France")
    with torch.no_grad():
        with edits_off(base.model):
            cache = cache_of(base.model(input_ids=ids[:, :8], use_cache=True))
        clean = copy.deepcopy(cache)
        found = base.model(input_ids=ids[:, 8:], **{CACHE: cache}, use_cache=True).logits[0]
        assert cache.get_seq_length() == ids.shape[1]
        for layer, before in zip(cache.layers, clean.layers, strict=True):
            assert torch.equal(layer.keys[:, :, :8], before.keys)
        with edits_off(base.model):
            without = base.model(input_ids=ids[:, 8:], **{CACHE: clean}, use_cache=True).logits[0]
    assert torch.equal(found[0], without[0])
    assert not same(found[-1], without[-1])


def test_what_was_recorded_of_a_cache_is_forgotten_once_it_is_filled_without_the_edit(tokenizer):
    base = Base(tiny_model("llama"), tokenizer)
    always(base, [0, 3])
    with torch.no_grad():
        cache = cache_of(base.model(input_ids=ids_of(base, CAPITAL), use_cache=True))
        cache.crop(2 - int(cache.get_seq_length()))
        with edits_off(base.model):
            base.model(input_ids=ids_of(base, "We saw the big Oslo of Spain and many"), **{CACHE: cache})
        before = [layer.keys.clone() for layer in cache.layers]
        base.model(input_ids=ids_of(base, "The capital of France"), **{CACHE: cache})
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, : keys.shape[2]], keys)


def test_several_texts_in_one_row_are_refused(tokenizer):
    base = Base(tiny_model("llama"), tokenizer)
    always(base, [0, 3])
    ids = torch.cat([ids_of(base, CAPITAL)] * 2, dim=1)
    places = torch.arange(ids.shape[1] // 2).repeat(2)[None]
    with pytest.raises(NotImplementedError, match="several texts in one row"):
        base.model(input_ids=ids, position_ids=places)


def test_in_a_chat_the_answer_may_ask_about_names_of_this_turn_and_the_one_before(tokenizer):
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<s>", pad_token="<s>")
    own.chat_template = "{% for m in messages %}{{ m['content'] }}<s>{% endfor %}"
    tracker = Tracker(own, Entities(Scope([[name] for name in NAMES]), FACTS, TARGETS), True)
    for text, near in (("France<s> a<s> b<s> c", False), ("a<s> b<s> France<s> c", True), ("a<s> France<s> b<s> c", False)):
        ids = own(text, add_special_tokens=False)["input_ids"]
        touched, state = tracker.touched(ids, 0), EMPTY
        for index in range(len(ids)):
            asked = ((0, 0),) if index == len(ids) - 1 else ()
            state = tracker.next(state, ids, index, index in touched, asked)
        assert bool(state.active) == near, text


def test_a_text_that_was_prepared_and_never_run_does_not_leak_into_the_next_call(tokenizer):
    base = Base(tiny_model("llama"), tokenizer)
    always(base, [0, 3])
    ids = ids_of(base, CAPITAL)
    with torch.no_grad():
        cache = cache_of(base.model(input_ids=ids[:, :-1], use_cache=True))
        base.model.prepare_inputs_for_generation(
            ids_of(base, LATER)[:, : ids.shape[1]], **{CACHE: cache}, attention_mask=torch.ones_like(ids)
        )
        close(base.model(input_ids=ids[:, -1:], **{CACHE: cache}).logits[0, -1], single(base, CAPITAL)[-1])


def test_gradient_checkpointing_under_an_edit_at_mentions_is_refused_with_the_way_out(tokenizer):
    base = Base(tiny_model("llama"), tokenizer)
    edit = always(base, [0, 3])
    old = not hasattr(base.model, "activation_checkpointing_enable")
    switch = "gradient_checkpointing" if old else "activation_checkpointing"
    getattr(base.model, switch + "_enable")()
    base.model.train()
    with pytest.raises(RuntimeError, match="switch it off"):
        base.model(input_ids=ids_of(base, CAPITAL))
    base.model(input_ids=ids_of(base, "Nobody is here")).logits.sum().backward()
    getattr(base.model, switch + "_disable")()
    base.model(input_ids=ids_of(base, CAPITAL)).logits.sum().backward()
    edit.detach()
