"""What is computed once must give the losses that running everything gives."""

from __future__ import annotations

import pytest
import torch
from conftest import FACTS, tiny_model

from hf_edit.base import Base
from hf_edit.layout import find_layout
from hf_edit.positions import pad
from hf_edit.suffix import Frontier, SuffixCache, caches_exactly, frozen, hidden_of, length_groups, read_keys_and_states
from hf_edit.weights.prompts import fact_texts
from hf_edit.weights.values import ValueSettings, optimize_values

TEXTS = [[5, 9, 33, 7, 21, 40, 8, 60, 3], [9, 8, 7, 6, 5], [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]]
CUTS = [4, 2, 7]
READS = [(0, 8), (0, 5), (1, 4), (2, 11), (1, 2)]


def _plain(model, layout, block, shift):
    """Each whole text by itself, with a shift of the block's MLP output at its cut."""
    module = model.get_submodule(layout.projection(block))
    logits = []
    for row, position in READS:

        def hook(_module, _args, output, row=row):
            shifted = output.reshape(1, len(TEXTS[row]), -1).clone()
            shifted[0, CUTS[row]] += shift
            return shifted.reshape(output.shape)

        handle = module.register_forward_hook(hook)
        logits.append(model(input_ids=torch.tensor([TEXTS[row]])).logits[0, position].float())
        handle.remove()
    return torch.stack(logits)


@pytest.mark.parametrize("start", [0, 2])
def test_running_the_suffix_equals_running_the_whole_text(architecture, start):
    model = tiny_model(architecture)
    layout = find_layout(model)
    cuts = CUTS if caches_exactly(model, layout) else [0, 0, 0]
    shift = torch.randn(48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), frozen(model):
        cache = SuffixCache(model, layout, start)
        clean = cache.add(TEXTS, cuts, READS, states=(4,))
        batch = cache.batch([0, 1, 2])
        again = batch.run(READS, states=(4,))
        torch.testing.assert_close(again.logits, clean.logits, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(again.states[4], clean.states[4], atol=2e-4, rtol=1e-4)

        def add(output):
            columns = [batch.column(row, cut) for row, cut in enumerate(CUTS)]
            return output.index_put((torch.arange(3), torch.tensor(columns)), shift.expand(3, -1), accumulate=True)

        edited = batch.run(READS, hooks={model.get_submodule(layout.projection(start)): add})
        torch.testing.assert_close(edited.logits, _plain(model, layout, start, shift), atol=2e-4, rtol=1e-4)
        assert (edited.logits - clean.logits).abs().max() > 1e-2


def test_prefixes_are_cached_wherever_that_is_exact(architecture):
    model = tiny_model(architecture)
    assert caches_exactly(model, find_layout(model)) == (architecture != "mpt")  # ALiBi counts cache slots there


def test_keys_and_states_are_those_of_a_plain_forward(architecture):
    model = tiny_model(architecture)
    layout = find_layout(model)
    name = layout.projection(1)
    points = [(2, 3), (0, 8), (1, 0)]
    with frozen(model):
        keys, states = read_keys_and_states(model, layout, TEXTS, points, modules=(name,), blocks=(1,), last=1)
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.update(key=args[0])),
        layout.blocks[1].register_forward_hook(lambda _, __, out: seen.update(state=out[0] if isinstance(out, tuple) else out)),
    ]
    for i, (row, position) in enumerate(points):
        with torch.no_grad():
            model(input_ids=torch.tensor([TEXTS[row]]))
        key = seen["key"].reshape(len(TEXTS[row]), -1)[position]
        torch.testing.assert_close(keys[name][i], key, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(states[1][i], seen["state"][0, position], atol=1e-5, rtol=1e-4)
    for handle in handles:
        handle.remove()


def test_reading_upwards_gives_what_whole_runs_give_while_weights_above_change(architecture):
    model = tiny_model(architecture)
    layout = find_layout(model)
    points = [(2, 3), (0, 8), (1, 0)]
    frontier = Frontier(model, layout, TEXTS)
    with frozen(model):
        for block in (1, 2):
            name = layout.projection(block)
            frontier.advance(block)
            keys, states = frontier.read(points, modules=(name,), blocks=(2,), last=2)
            again, whole = read_keys_and_states(model, layout, TEXTS, points, modules=(name,), blocks=(2,), last=2)
            torch.testing.assert_close(keys[name], again[name], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(states[2], whole[2], atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                model.get_submodule(name).weight.mul_(1.1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "granite", "gemma3", "olmo2", "mpt"])
def test_the_fast_value_optimisation_has_the_losses_of_the_plain_one(tokenizer, architecture):
    """Step by step, also once the clamp is active."""
    base = Base(tiny_model(architecture), tokenizer)
    layout = base.layout()
    settings = ValueSettings(block=2, steps=8, lr=0.5, kl_factor=0.1, tail_factor=0.2, weight_decay=0.5, clamp=0.3)
    with frozen(base.model):
        texts = fact_texts(base, FACTS[:3], ["It was a fine day. "], tail_tokens=3)
        values = optimize_values(base, texts, settings, progress=False)
        plain, lengths = zip(*(_plain_losses(base, layout, fact, settings, values.scale) for fact in texts), strict=True)
    torch.testing.assert_close(values.losses, torch.stack(plain, dim=1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(lengths), torch.full((3,), 0.3), atol=1e-3, rtol=0)


def _plain_losses(base, layout, fact, settings, scale):
    """The optimisation as the papers write it: whole texts, one fact, everything run again at every step. Losses, and the
    residual's length at the end relative to |v|."""
    module = base.model.get_submodule(layout.projection(settings.block))
    rows = [*fact.rewrites, *fact.kept]
    ids, mask = pad([t.ids for t in rows])
    states = []
    handles = [
        read.register_forward_hook(lambda _, __, out: states.append(hidden_of(out)))
        for read in (module, layout.blocks[settings.block])
    ]
    with torch.no_grad():
        clean = base.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
    for handle in handles:
        handle.remove()
    clean[0, :, rows[0].labels[0]] = -10.0  # behind the target the clean model may not say it again
    clean[0] = clean[0].log_softmax(-1)
    output, stream = (state.view(*ids.shape, -1)[0, rows[0].subject].norm() for state in states)
    norm = output if scale is None else stream / scale
    delta = torch.zeros(48, requires_grad=True)
    momentum = torch.zeros(48)
    losses = []
    for number in range(settings.steps):

        def hook(_module, _args, output, delta=delta):
            at = (torch.arange(len(rows)), torch.tensor([t.subject for t in rows]))
            return output.index_put(at, delta.expand(len(rows), -1), accumulate=True)

        handle = module.register_forward_hook(hook)
        out = base.model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        handle.remove()
        nll, tail, essence = [], [], []
        for i, text in enumerate(rows):
            kl = (out[i].exp() * (out[i] - clean[i])).sum(-1)
            if i < len(fact.rewrites):
                first, end = text.target
                nll.append(-out[i, range(first - 1, end - 1), list(text.labels)].mean())
                tail += list(kl[end - 1 : len(text.ids) - 1])
            else:
                essence.append(kl[len(text.ids) - 1])
        loss = sum(nll) / len(nll) + settings.tail_factor * sum(tail) / max(1, len(tail))
        loss = loss + settings.kl_factor * sum(essence) / len(essence)
        losses.append(loss.detach())
        (gradient,) = torch.autograd.grad(loss + settings.weight_decay * delta.norm() / (norm * stream), delta)
        momentum = 0.8 * momentum + gradient
        ahead = gradient + 0.8 * momentum
        length = settings.lr * settings.clamp * norm * min(1.0, 2 * (1 - number / settings.steps))
        with torch.no_grad():
            delta -= length * ahead / ahead.norm()
            delta *= min(1.0, float(settings.clamp * norm / delta.norm()))
    return torch.stack(losses), (delta.norm() / norm).detach()


def test_rows_are_grouped_so_that_little_padding_is_computed():
    lengths = [3, 40, 3, 41, 4, 3, 40, 4] * 10
    groups = length_groups(lengths, torch.device("cpu"))
    assert sorted(i for group in groups for i in group) == list(range(80))
    padded = sum(len(g) * max(lengths[i] for i in g) for g in groups)
    assert padded < 1.1 * sum(lengths)
    assert len(groups) == 2


def test_a_frozen_model_is_as_before_afterwards():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    with frozen(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not model.model.layers[0].training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
