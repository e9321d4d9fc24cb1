from __future__ import annotations

import pytest
import torch
from conftest import FACTS, tiny_model

from hf_edit import Fact, SteamConfig
from hf_edit.answers import score_targets
from hf_edit.base import Base
from hf_edit.methods.steam import anchors as anchoring
from hf_edit.methods.steam.alignment import Alignment, Contrast
from hf_edit.methods.steam.anchors import Anchors, build_anchors, informative_blocks
from hf_edit.positions import encode
from hf_edit.references import Reference
from hf_edit.suffix import frozen
from hf_edit.weights.prompts import GENERIC_PROMPTS, fact_texts, spared_prompts
from hf_edit.weights.values import ValueSettings, optimize_values

BLOCKS = (3, 4)
# The tiny model knows nothing: what is among its own first ten choices after a prompt is what it "recalls".
PROMPTS = ("The capital of {} is", "{} lies in", "People go to {} from")


def known(base: Base) -> list[Reference]:
    """References that the model recalls."""
    found = []
    for prompt in PROMPTS:
        for subject in ("Peru", "Norway", "Kenya", "Chile", "Cuba", "Nepal"):
            text = prompt.replace("{}", subject)
            with torch.no_grad():
                logits = base.model(input_ids=torch.tensor([base.tokenizer(text)["input_ids"]])).logits[0, -1]
            for token in logits.topk(10).indices.tolist():
                word = base.tokenizer.decode([token])
                if (
                    word[:1] == " "
                    and word[1:].isalpha()
                    and len(base.tokenizer(text + word)["input_ids"]) == len(base.tokenizer(text)["input_ids"]) + 1
                ):
                    found.append(Reference(prompt, subject, (prompt,), word[1:]))
    assert len(found) > 5
    return found


@pytest.fixture(scope="module")
def base(tokenizer):
    return Base(tiny_model("llama"), tokenizer)


def _anchors(seed: int = 0) -> Anchors:
    generator = torch.Generator().manual_seed(seed)

    def states(rows: int) -> dict[int, torch.Tensor]:
        return {b: torch.randn(rows, 48, generator=generator) for b in BLOCKS}

    return Anchors(BLOCKS, states(3), states(3), states(3), states(5), (4, 0, 7))


def test_the_alignment_is_zero_at_the_anchor_two_opposite_to_it_and_absent_without_one():
    found = _anchors()
    term = Alignment(found, [0, 1, 2], 1.0)
    there = {b: found.origin[b] + 3 * found.states[b] for b in BLOCKS}
    opposite = {b: found.origin[b] - found.states[b] for b in BLOCKS}
    torch.testing.assert_close(term.loss([0, 1, 2], there), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(term.loss([0, 1, 2], opposite), torch.tensor([2.0, 0.0, 2.0]), atol=1e-5, rtol=0)


def test_the_contrast_is_infonce_over_new_old_and_other_objects():
    found = _anchors()
    found.old[3][0], found.old[4][0] = 0.0, 0.0  # the first fact's old object is unknown
    term = Contrast(found, [0, 2], 1.0, temperature=0.5)
    streams = {b: found.origin[b][[0, 2]] + torch.randn(2, 48, generator=torch.Generator().manual_seed(1)) for b in BLOCKS}
    expected = []
    for row, fact in enumerate((0, 2)):
        terms = []
        for b in BLOCKS:
            candidates = [found.states[b][fact], *([found.old[b][fact]] if fact else []), *found.others[b]]
            h = streams[b][row] - found.origin[b][fact]
            cosines = torch.stack([torch.cosine_similarity(h, c, dim=0) for c in candidates]) / 0.5
            terms.append(cosines.logsumexp(0) - cosines[0])
        expected.append(torch.stack(terms).mean())
    torch.testing.assert_close(term.loss([0, 1], streams), torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_the_gradient_ratio_sets_each_facts_weight(base):
    """Twice the ratio pulls twice as hard, and no ratio takes the weight."""
    layout = base.layout()
    generator = torch.Generator().manual_seed(0)
    target = {b: torch.randn(4, 48, generator=generator) for b in BLOCKS}
    found = Anchors(BLOCKS, {b: torch.zeros(4, 48) for b in BLOCKS}, target, target, target, (5, 5, 5, 5))
    settings = ValueSettings(1, 12, 0.05, 0.0625, 0.0, 0.5, None)
    nearness = []
    with frozen(base.model):
        texts = fact_texts(base, FACTS, [], 0)
        for ratio in (1e-6, 1.0, 4.0):
            term = Alignment(found, range(4), None, ratio)
            values = optimize_values(base, texts, settings, objective=term, layout=layout, progress=False)
            assert values.deltas.isfinite().all()
            nearness.append(_final_term(base, texts, values, term))
    assert nearness[0] > nearness[1] > nearness[2]


def _final_term(base, texts, values, term) -> float:
    """The alignment that the optimised values reach, with one more step of the same optimisation's reading."""
    from hf_edit.suffix import read_keys_and_states

    handle = base.model.get_submodule(base.layout().projection(1)).register_forward_hook(
        lambda _, __, out: out.index_put(at, values.deltas, accumulate=True)
    )
    rows = [t.rewrites[0].ids[: t.rewrites[0].target[0]] for t in texts]
    at = (torch.arange(len(rows)), torch.tensor([t.rewrites[0].subject for t in texts]))
    try:
        _, states = read_keys_and_states(
            base.model, base.layout(), rows, [(i, len(r) - 1) for i, r in enumerate(rows)], blocks=BLOCKS, last=max(BLOCKS)
        )
    finally:
        handle.remove()
    return float(term.loss(list(range(len(rows))), states).mean())


def test_an_objects_anchor_is_read_once_a_model(base, monkeypatch):
    references = known(base)
    objects = {r.object for r in references}
    obj = max(objects, key=lambda o: sum(r.object == o for r in references))
    fact = Fact("Sweden", "The capital of {} is", obj)
    settings = SteamConfig(references=[*references], min_references=1).anchor_settings
    calls = []
    real = anchoring.score_references
    monkeypatch.setattr(anchoring, "score_references", lambda *a, **k: calls.append(len(a[1])) or real(*a, **k))
    first = build_anchors(base, [fact], BLOCKS, settings)
    assert calls
    assert first.counts[0] == sum(r.object == obj for r in references)
    calls.clear()
    again = build_anchors(base, [fact, Fact("Finland", "The capital of {} is", obj)], BLOCKS, settings)
    assert not calls
    assert torch.equal(again.states[3][0], first.states[3][0])
    fewer = SteamConfig(references=references, min_references=1, max_references=1).anchor_settings
    assert build_anchors(base, [fact], BLOCKS, fewer).counts == (1,)
    assert calls  # other settings, other anchors


def test_the_centred_frame_takes_off_what_all_objects_share_and_the_raw_one_nothing(base):
    references = known(base)
    fact = Fact("Sweden", "The capital of {} is", references[0].object)
    raw, centred = (
        build_anchors(
            base, [fact], BLOCKS, SteamConfig(references=references, min_references=1, anchor_frame=frame).anchor_settings
        )
        for frame in ("raw", "centred")
    )
    for b in BLOCKS:
        assert not raw.origin[b].any()
        torch.testing.assert_close(centred.origin[b] + centred.states[b], raw.states[b], atol=1e-5, rtol=1e-4)


def test_the_object_frame_compares_with_the_facts_relation(base):
    fact = Fact("Sweden", "The capital of {} is", "Tokyo")
    settings = SteamConfig(anchor_frame="object", min_references=1).anchor_settings
    found = build_anchors(base, [fact], BLOCKS, settings, contrast=3)
    means = anchoring._relation_means(base)
    assert any(torch.equal(found.origin[3][0], mean[3]) for mean in means.values())


def test_blocks_found_from_the_data_lie_above_the_edit(base):
    for above, width in ((1, 2), (3, 2), (4, 3)):
        blocks = informative_blocks(base, above, width)
        assert blocks
        assert min(blocks) > above
        assert max(blocks) < 6


def test_without_a_known_relation_the_object_frame_says_that_there_is_no_anchor(base):
    references = known(base)
    fact = Fact("Sweden", "The capital of {} is", references[0].object)
    settings = SteamConfig(references=references, anchor_frame="object", min_references=1).anchor_settings
    assert build_anchors(base, [fact], BLOCKS, settings).counts == (0,)


def test_prompts_that_ask_what_the_fact_asks_are_not_kept(base):
    """A fact that is worded like one of the pool's prompts does not keep that prompt's answer."""
    facts = [Fact("France", GENERIC_PROMPTS[4], "Islam"), Fact("Spain", GENERIC_PROMPTS[7], "Berlin")]
    kept = spared_prompts(base, facts, 12)
    assert all(len(set(own)) == 12 for own in kept)
    assert GENERIC_PROMPTS[4] not in kept[0]
    assert GENERIC_PROMPTS[7] not in kept[1]
    assert spared_prompts(base, facts, 1) == [GENERIC_PROMPTS[:1]] * 2


def test_settings_that_are_shared_name_no_path_of_this_machine(tmp_path):
    private = SteamConfig(references=["bank", str(tmp_path / "mine.jsonl")], statistics=str(tmp_path))
    shared = private.shareable()
    assert (shared.references, shared.statistics) == (["bank", "given"], "given")
    assert str(tmp_path) not in str(shared.to_dict())
    for public in (SteamConfig(), SteamConfig(references="datasets:me/facts", statistics="me/stats")):
        assert public.shareable() is public


def test_a_fact_without_references_gets_an_in_context_anchor_where_the_model_recalls_what_it_is_given(base):
    """Of the prompts that give the fact, those count after which the object is among the first ten; the anchor is the mean of
    the states before the object."""
    recalled = next(r for r in known(base) if r.prompts[0] == PROMPTS[0])
    fact = Fact(recalled.subject, recalled.prompts[0], recalled.object)
    never = Fact("Sweden", "The capital of {} is", "Tokyo")
    settings = SteamConfig(references=[]).anchor_settings
    assert build_anchors(base, [fact, never], (3,), settings).counts == (0, 0)
    found = build_anchors(base, [fact, never], (3,), settings, given_blocks=(4, 5))
    prompts = anchoring._prompts_that_give(base, fact)
    scores = score_targets(base, encode(base.tokenizer, prompts), blocks=(4, 5))
    near = [s for s in scores if s.rank < 10]
    assert found.counts[0] == len(near)
    assert found.in_context == {i for i, count in enumerate(found.counts) if count}
    assert found.blocks == (3, 4, 5)
    assert not found.states[3].any(), "only where in-context anchors are used"
    if near:
        given = torch.stack([s.states[5] for s in near]).mean(0)
        torch.testing.assert_close(found.origin[5][0] + found.states[5][0], given, atol=1e-4, rtol=1e-3)


def test_the_alignment_is_the_mean_over_the_blocks_where_a_fact_has_an_anchor():
    found = _anchors()
    found.states[3][2] = 0
    term = Alignment(found, [0, 2], 1.0)
    opposite = {b: found.origin[b][[0, 2]] - found.states[b][[0, 2]] for b in BLOCKS}
    torch.testing.assert_close(term.loss([0, 1], opposite), torch.tensor([2.0, 2.0]), atol=1e-5, rtol=0)
