from __future__ import annotations

import math

import pytest
import torch
from conftest import CORPUS, FACTS, same, snapshot, tiny_model, trained

from hf_edit import BaseMismatchError, EditableModelForCausalLM, Fact, KeyStatistics
from hf_edit.answers import target_probabilities
from hf_edit.base import Base
from hf_edit.methods.scope.points import Points
from hf_edit.statistics import Moment
from hf_edit.suffix import frozen, read_keys_and_states
from hf_edit.weights.attach import ActingAlone, Factors, WeightAttachment
from hf_edit.weights.editors import EDITORS, Insertion
from hf_edit.weights.prompts import fact_texts
from hf_edit.weights.solve import Protected, insert

NAMES = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}


def _factors(rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = {"llama": 96, "gpt2": 192}
    return {
        name: Factors(torch.randn(48, rank, generator=generator), torch.randn(rank, width[kind], generator=generator))
        for kind, name in NAMES.items()
    }


def test_the_insertion_is_memits_equation():
    generator = torch.Generator().manual_seed(0)
    K, R = torch.randn(20, 5, generator=generator).double(), torch.randn(8, 5, generator=generator).double()
    X = torch.randn(100, 20, generator=generator).double()
    C = X.T @ X / 100
    moment = Moment(C, 100)
    update = insert(K, moment.solve(K) / 15.0, R)
    ridge = 1e-1 * C.diagonal().median() * torch.eye(20)
    direct = R @ K.T @ torch.linalg.inv(15.0 * (C + ridge) + K @ K.T)
    torch.testing.assert_close(update.factors.dense(), direct.float(), atol=1e-5, rtol=1e-4)


def test_keys_of_earlier_facts_are_protected():
    """The new facts' update with earlier keys equals the one of a system that holds them, and moves them less."""
    generator = torch.Generator().manual_seed(0)
    K, earlier = (torch.randn(20, n, generator=generator).double() for n in (5, 3))
    R = torch.randn(8, 5, generator=generator).double()
    X = torch.randn(100, 20, generator=generator).double()
    C = X.T @ X / 100

    def own(keys):
        return torch.linalg.solve(15.0 * C, keys)

    protected = insert(K, Protected.of(earlier, own).precondition(K), R).factors.dense().double()
    direct = R @ K.T @ torch.linalg.inv(15.0 * C + earlier @ earlier.T + K @ K.T)
    torch.testing.assert_close(protected, direct, atol=1e-5, rtol=1e-4)
    bare = insert(K, Protected.of(earlier[:, :0], own).precondition(K), R).factors.dense().double()
    assert (protected @ earlier).norm() < 0.7 * (bare @ earlier).norm()


def test_more_protected_keys_than_the_key_is_wide_are_the_same_system():
    generator = torch.Generator().manual_seed(0)
    K, many = (torch.randn(12, n, generator=generator).double() for n in (3, 40))
    R = torch.randn(8, 3, generator=generator).double()
    update = insert(K, Protected.of(many, lambda keys: keys / 5.0).precondition(K), R).factors.dense().double()
    direct = R @ K.T @ torch.linalg.inv(5.0 * torch.eye(12) + many @ many.T + K @ K.T)
    torch.testing.assert_close(update, direct, atol=1e-6, rtol=1e-5)


def test_an_insertion_leaves_the_prompts_other_tokens_alone(tokenizer):
    """Their keys are moved far less than without the protection, at the same keys of the facts."""
    base = Base(trained("llama", tokenizer), tokenizer)
    layout, block = base.layout(), 1
    name = layout.projection(block)
    with frozen(base.model):
        statistics = KeyStatistics.compute(base.model, tokenizer, list(CORPUS), modules=[name], progress=False)
        texts = fact_texts(base, FACTS[:4], [])
        rows = [text.rewrites[0] for text in texts]
        points = [(i, p) for i, row in enumerate(rows) for p in range(row.target[0]) if p != row.subject]
        others = read_keys_and_states(base.model, layout, [r.ids for r in rows], points, modules=(name,), last=block)[0][name]
        deltas = torch.randn(4, layout.hidden_size)
        moved = []
        for bystanders in (0.0, 1.0):
            problem = Insertion(
                base, layout, (block,), texts, deltas, None, statistics, (), 0.1, 0.02, 0.1, bystanders=bystanders
            )
            moved.append(float((others @ EDITORS["memit"](problem)[name].factors.dense().T).norm()))
    assert moved[1] < 0.3 * moved[0]


def test_facts_that_an_insertion_loses_are_raised_in_the_edited_model(tokenizer):
    """Under statistics that outweigh the facts, the first insertion carries over only a part of each value."""
    model = EditableModelForCausalLM(trained("llama", tokenizer), tokenizer)
    targets = {"France": "Tokyo", "Spain": "Rome", "Japan": "Berlin", "Germany": "Madrid"}
    facts = [Fact(subject, "Yes. The capital of {} is", target) for subject, target in targets.items()]
    settings = {"anchor_weight": 0.0, "contexts": 0, "statistics_tokens": 512, "covariance_weight": 400.0, "progress": False}
    likelihoods = []
    for retries in (0, 2):
        model.edit(facts, "steam", layers=[0, 1], clamp=3.0, retries=retries, **settings)
        likelihoods.append(sum(math.log(p) for p in target_probabilities(Base(model.get_base_model(), tokenizer), facts)))
        model.rollback()
    assert likelihoods[1] > likelihoods[0] + 1


def test_the_null_space_update_is_alphaedits_equation():
    generator = torch.Generator().manual_seed(0)
    K, earlier = (torch.randn(20, n, generator=generator).double() for n in (4, 2))
    R = torch.randn(8, 4, generator=generator).double()
    basis = torch.linalg.qr(torch.randn(20, 12, generator=generator).double()).Q
    P = basis @ basis.T
    update = insert(K, Protected.of(earlier, lambda keys: P @ keys / 10.0).precondition(K), R)
    system = P @ (K @ K.T + earlier @ earlier.T) + 10.0 * torch.eye(20)
    direct = torch.linalg.solve(system, P @ K @ R.T).T
    torch.testing.assert_close(update.factors.dense().double(), direct, atol=1e-5, rtol=1e-4)
    outside = (torch.eye(20).double() - P) @ torch.randn(20, 6, generator=generator).double()
    assert (update.factors.dense().double() @ outside).abs().max() < 1e-5  # what the model knows is not touched


def test_fewer_facts_are_solved_from_what_is_stored():
    """Taking a fact out equals never having put it in, for the same keys and residuals."""
    from conftest import FACTS

    from hf_edit.methods import Fit, get_method
    from hf_edit.methods.steam.record import Record

    generator = torch.Generator().manual_seed(0)
    K, R = torch.randn(20, 4, generator=generator).double(), torch.randn(8, 4, generator=generator).double()
    solve = Moment(torch.eye(20).double(), 1).solve
    whole, part = (insert(K[:, keep], solve(K[:, keep]), R[:, keep]) for keep in ([0, 1, 2, 3], [0, 2]))
    tensors = {"m.left": whole.factors.left, "m.right": whole.factors.right, "m.gram": whole.gram}
    tensors |= Record.of(torch.randn(4, 1, 8), 0, "memit").tensors()
    left = get_method("steam").remove(Fit(tensors, ("m",), tuple(FACTS)), [0, 2])
    assert left.facts == (FACTS[0], FACTS[2])
    torch.testing.assert_close(left.tensors["m.left"] @ left.tensors["m.right"], part.factors.dense(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(NAMES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_factors_change_the_output_by_their_product_and_leave_no_trace(kind, dtype):
    model = tiny_model(kind).to(dtype)
    before = snapshot(model)
    change = _factors()[NAMES[kind]]
    module = model.get_submodule(NAMES[kind])
    keys = torch.randn(1, 3, change.right.shape[1]).to(dtype)
    clean = module(keys)
    attachment = WeightAttachment(model, {NAMES[kind]: change})
    expected = clean.float() + keys.float() @ change.dense().T
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(module(keys).float(), expected, atol=tolerance, rtol=tolerance)
    assert bool(attachment.beside) == (dtype != torch.float32)
    attachment.detach()
    attachment.detach()
    assert same(before, model)
    assert torch.equal(module(keys), clean)


@pytest.mark.parametrize("flat", [False, True], ids=["rows", "flat"])
def test_a_fact_by_itself_acts_on_the_tokens_where_it_is_on_and_nowhere_else(flat):
    values = torch.randn(8, 2)
    keys, clean = torch.randn(3, 4, 5), torch.randn(3, 4, 8)
    points = Points([0, 2], [1, 3], [1, 0], [None, None], 4)
    given = (keys.flatten(0, 1), clean.flatten(0, 1)) if flat else (keys, clean)
    before = clean.clone()
    found = ActingAlone(values)(*given, points).reshape(clean.shape)
    assert torch.equal(clean, before)
    for row, column, fact in ((0, 1, 1), (2, 3, 0)):
        before[row, column] += values[:, fact]
    torch.testing.assert_close(found, before)


def test_edits_on_top_of_each_other_come_off_in_reverse_without_a_trace():
    model = tiny_model("llama")
    before = snapshot(model)
    stack = [WeightAttachment(model, {NAMES["llama"]: _factors(seed=s)[NAMES["llama"]]}) for s in range(3)]
    assert not same(before, model)
    for attachment in reversed(stack):
        attachment.detach()
    assert same(before, model)


@pytest.mark.parametrize(
    "factors",
    [
        {"model.layers.9.mlp.down_proj": Factors(torch.ones(48, 1), torch.ones(1, 96))},
        {"": Factors(torch.ones(48, 1), torch.ones(1, 96))},
        {"model.norm": Factors(torch.ones(48, 1), torch.ones(1, 96))},
        {NAMES["llama"]: Factors(torch.ones(1, 1), torch.ones(1, 1))},  # would broadcast
        {NAMES["llama"]: Factors(torch.ones(96, 1), torch.ones(1, 48))},  # transposed
    ],
)
def test_factors_that_do_not_fit_are_refused_and_nothing_changes(factors):
    model = tiny_model("llama")
    before = snapshot(model)
    good = {"model.layers.0.mlp.down_proj": Factors(torch.ones(48, 1), torch.ones(1, 96))}
    with pytest.raises(BaseMismatchError):
        WeightAttachment(model, {**good, **factors})
    assert same(before, model)
