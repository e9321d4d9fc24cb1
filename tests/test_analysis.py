"""The analysis must show the model as it is, and leave it so."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import transformers
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, same, snapshot, tiny_model

from hf_edit import EditableModelForCausalLM, Fact
from hf_edit.analysis import Cosine, ResidualFlow, Streams, logit_lens, plot_flow, project, residual_flow
from hf_edit.answers import target_probabilities
from hf_edit.base import Base
from hf_edit.suffix import read_keys_and_states

TEXT = [5, 9, 33, 7, 21, 40, 8, 60, 3]
HELD_OUT = [
    Fact("Italy", "The capital of {} is", "Rome"),
    Fact("Italy", "The capital city of {} is", "Rome"),
    Fact("The Colosseum", "{} is located in the city of", "Rome"),
]
FACT = Fact("Spain", "The capital of {} is", "Rome", target_old="Madrid")


def _check_last_block(model, tokenizer):
    base = Base(model, tokenizer)
    last = len(base.layout()) - 1
    points = [(0, 3), (0, 8)]
    _, states = read_keys_and_states(model, base.layout(), [TEXT], points, blocks=(last - 1, last), last=last)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TEXT])).logits[0, [3, 8]]
    torch.testing.assert_close(logit_lens(base, states[last]), expected, atol=1e-4, rtol=1e-4)
    assert (logit_lens(base, states[last - 1]) - expected).abs().max() > 1e-2


def test_the_last_blocks_lens_is_the_models_own_prediction(architecture, tokenizer):
    _check_last_block(tiny_model(architecture), tokenizer)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (transformers.Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 12, "num_key_value_heads": 2}),
        (transformers.GraniteConfig, {"logits_scaling": 8.0}),
        (transformers.CohereConfig, {"logit_scale": 0.25}),
        # OPT-350M has no final norm, and maps the stream to narrower embeddings
        (transformers.OPTConfig, {"word_embed_proj_dim": 24, "do_layer_norm_before": False, "ffn_dim": 96}),
    ],
)
def test_the_lens_has_the_models_own_caps_scales_and_projections(tokenizer, kind, settings):
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if kind is transformers.OPTConfig:
        sizes.pop("intermediate_size")
    model = transformers.AutoModelForCausalLM.from_config(kind(**sizes, **ends, **settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    _check_last_block(model, tokenizer)


def test_the_lens_of_half_precision_states_runs_in_the_models_dtype(tokenizer):
    base = Base(tiny_model("llama").to(torch.bfloat16), tokenizer)
    logits = logit_lens(base, torch.randn(3, 48))
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 1000)


def test_without_edits_the_edited_and_clean_flows_are_equal(llama):
    flow = residual_flow(llama, FACTS)
    assert flow.blocks == tuple(range(6))
    for fact in flow.facts:
        assert fact.clean == fact.edited
        assert fact.residual == (0.0,) * 6


@pytest.mark.parametrize(("method", "first"), [("rome", 2), ("lks", 3)])
def test_an_edit_moves_the_stream_only_from_its_block_on(llama, method, first):
    """An edited weight touches all tokens; LKS rewrites the subject's, which later tokens see from the next block on."""
    settings = {**QUICK_STEAM, "layers": [2]} if method == "rome" else {**QUICK_LKS, "layer": 2}
    llama.edit(FACTS[0], method, progress=False, verify=False, **settings)
    (fact,) = residual_flow(llama, FACTS[0]).facts
    assert fact.residual[:first] == (0.0,) * first
    assert min(fact.residual[first:]) > 1e-4
    assert fact.clean.new.log_prob[:first] == fact.edited.new.log_prob[:first]


@pytest.mark.parametrize("method", ["rome", "lks"])
def test_both_lenses_end_in_what_the_model_says_with_the_edits_and_without(llama, method):
    settings = QUICK_STEAM if method == "rome" else QUICK_LKS
    llama.edit(FACTS[0], method, progress=False, verify=False, **settings)
    (flow,) = residual_flow(llama, FACTS[0], blocks=[-1]).facts
    base = Base(llama.base_model, llama.tokenizer)
    edited = target_probabilities(base, [FACTS[0]])
    with llama.disable_edits():
        clean = target_probabilities(base, [FACTS[0]])
        greedy = llama.tokenizer(llama.ask(FACTS[0].question, max_new_tokens=1))["input_ids"][0]
    lens = torch.tensor([flow.edited.new.log_prob[0], flow.clean.new.log_prob[0]]).exp()
    torch.testing.assert_close(lens, torch.tensor([*edited, *clean]), atol=1e-5, rtol=1e-3)
    assert edited[0] > 2 * clean[0]
    assert flow.edited.new.rank[0] < flow.clean.new.rank[0]
    assert flow.clean.old.rank == (1,), "the old object is the clean model's first choice"
    assert llama.tokenizer(flow.tokens[1])["input_ids"] == greedy


def test_the_old_object_is_the_facts_own_where_it_names_one(llama):
    (flow,) = residual_flow(llama, FACT, blocks=[5]).facts
    assert flow.old == "Madrid"
    assert flow.tokens[1] != flow.tokens[0]
    assert " Madrid".startswith(flow.tokens[1])


def test_the_analysis_leaves_the_model_as_it_was(llama):
    llama.edit(FACTS[0], "lks", pack_name="states", progress=False, verify=False, **QUICK_LKS)
    llama.edit(FACTS[1], "rome", pack_name="weights", progress=False, verify=False, **QUICK_STEAM)
    llama.base_model.train()
    before, active = snapshot(llama.base_model), llama.active_packs
    answers = llama.ask([f.question for f in FACTS])
    residual_flow(llama, FACTS)
    assert same(before, llama.base_model)
    assert llama.active_packs == active
    assert llama.base_model.training
    assert all(p.requires_grad for p in llama.base_model.parameters())
    assert llama.ask([f.question for f in FACTS]) == answers


@pytest.fixture
def knowing(tokenizer):
    """A tiny model to which a bias makes it easy to recall a few cities."""
    model = tiny_model("gptj")
    cities = ("Rome", "Madrid", "Berlin", "Paris")
    firsts = [tokenizer(f" {city}")["input_ids"][0] for city in cities]
    assert len(set(firsts)) == len(cities)
    with torch.no_grad():
        model.lm_head.bias[firsts] += 1000.0
    return EditableModelForCausalLM(model, tokenizer)


def test_the_anchor_is_the_clean_mean_before_the_object_and_cosines_are_to_it(knowing):
    knowing.edit(FACT, "rome", progress=False, verify=False, **QUICK_STEAM)
    flow = residual_flow(knowing, FACT, references=HELD_OUT, others=["Berlin", "Paris"], blocks=[3, 5])
    assert flow.others == ("Berlin", "Paris")
    states = []
    handle = knowing.base_model.transformer.h[3].register_forward_hook(
        lambda _, __, out: states.append((out[0] if isinstance(out, tuple) else out)[0, -1])
    )
    with knowing.disable_edits(), torch.no_grad():
        for reference in HELD_OUT:
            knowing(**knowing.tokenizer(reference.question, return_tensors="pt", return_token_type_ids=False))
    handle.remove()
    anchor = torch.stack(states).mean(0)
    torch.testing.assert_close(flow.streams.anchors["rome"][0], anchor, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(flow.streams.references["rome"][:, 0], torch.stack(states), atol=1e-5, rtol=1e-4)
    (fact,) = flow.facts
    assert fact.references == 3
    for stream, kept in ((fact.clean, flow.streams.clean), (fact.edited, flow.streams.edited)):
        cosine = torch.cosine_similarity(kept[0, 0], anchor, dim=0)
        assert stream.raw.anchor[0] == pytest.approx(float(cosine), abs=1e-4)
        assert stream.centred.anchor[0] != pytest.approx(float(cosine), abs=1e-3)
    assert fact.edited.raw != fact.clean.raw


def test_above_is_the_cosine_less_that_to_others():
    assert Cosine((0.9, 0.5), (0.7, 0.6)).above == pytest.approx((0.2, -0.1))


def test_a_fact_without_an_anchor_has_no_cosines_and_says_so(llama):
    flow = residual_flow(llama, Fact("Spain", "The capital of {} is", "Zzyzx"))
    assert flow.facts[0].references == 0
    assert flow.facts[0].clean.raw is None
    assert flow.by_block()[0]["above_clean"] is None
    assert "no anchor" in str(flow)


def test_flows_are_json_and_a_table_of_blocks(knowing):
    knowing.edit(FACT, "rome", progress=False, verify=False, **QUICK_STEAM)
    flow = residual_flow(knowing, [FACT, FACTS[0]], others=["Berlin", "Paris"])
    written = json.loads(json.dumps(flow.to_dict(), allow_nan=False))
    assert written == flow.to_dict()
    assert Fact.from_dict(written["facts"][0]["fact"]) == FACT
    assert written["facts"][0]["edited"]["centred"]["anchor"] == list(flow.facts[0].edited.centred.anchor)
    assert len(written["facts"][1]["residual"]) == len(written["blocks"]) == 6
    lines = str(flow).splitlines()
    assert [line.split()[0] for line in lines[-6:]] == ["0", "1", "2", "3", "4", "5"]
    assert FACT.question in str(flow)
    assert json.loads(json.dumps(project(flow).to_dict())) == project(flow).to_dict()
    assert "of the variance" in str(project(flow))


def test_the_projection_keeps_distances_of_states_that_lie_in_a_plane(knowing):
    flow = residual_flow(knowing, FACT, references=HELD_OUT, others=["Berlin"], blocks=[4])
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(48, 2, generator=generator)).Q.T
    clean, edited, *references = (torch.randn(6, 2, generator=generator) * 5 + 3) @ plane + 7
    references = torch.stack(references)
    states = Streams(
        clean[None, None], edited[None, None], {"rome": references.mean(0, keepdim=True)}, {"rome": references[:, None]}
    )
    shown = project(ResidualFlow(flow.blocks, flow.facts, flow.others, states), fact=FACT)
    assert [p.kind for p in shown.points] == ["clean", "edited", *["reference"] * 4, "anchor"]
    assert sum(shown.explained) == pytest.approx(1.0)
    found = torch.tensor([[p.x, p.y] for p in shown.points])
    expected = torch.cat([torch.stack([clean, edited]), references, references.mean(0, keepdim=True)])
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(expected, expected), atol=1e-3, rtol=1e-3)


def test_a_projection_of_states_that_are_all_alike_is_a_point(llama):
    shown = project(residual_flow(llama, Fact("Spain", "The capital of {} is", "Zzyzx"), blocks=[1]))
    assert shown.explained == (0.0, 0.0)
    assert {(p.x, p.y) for p in shown.points} == {(0.0, 0.0)}


def test_edits_are_drawn_beside_each_other(knowing, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    flows = {"nothing": residual_flow(knowing, FACT, others=["Berlin"])}
    knowing.edit(FACT, "rome", progress=False, verify=False, **QUICK_STEAM)
    flows["rome"] = residual_flow(knowing, FACT, others=["Berlin"])
    figure = plot_flow(flows, tmp_path / "flow.png", block=3)
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    cosines, lens, plane = figure.axes
    assert [line.get_label() for line in cosines.get_lines()[:3]] == ["clean", "nothing", "rome"]
    heights = cosines.get_lines()[2].get_ydata()
    assert list(heights) == pytest.approx([row["centred_above_edited"] for row in flows["rome"].by_block()])
    assert len(lens.get_lines()) == 6
    assert "3" in plane.get_title()
    mine = Figure().subplots(1, 3)
    assert flows["rome"].plot(axes=mine) is mine[0].figure
    with pytest.raises(ValueError, match="three axes"):
        plot_flow(flows, axes=mine[:2])


def test_without_matplotlib_a_figure_says_how_to_get_it(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install hf-edit\[plots\]"):
        residual_flow(llama, FACTS[0], blocks=[0]).plot()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": [6]}, "blocks 0 to 5"),
        ({"blocks": []}, "blocks is empty"),
        ({"others": 0}, "at least 1"),
        ({"others": []}, "others is empty"),
        ({"others": ["Atlantis"]}, "no references for 'Atlantis'"),
        ({"others": ["rome"]}, "'rome' is the target"),
    ],
)
def test_wrong_arguments_are_named(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        residual_flow(llama, FACT, **settings)


def test_a_model_without_edits_to_switch_is_refused(llama):
    with pytest.raises(TypeError, match="EditableModelForCausalLM"):
        residual_flow(llama.base_model, FACT)


def test_flows_that_do_not_go_together_are_refused(llama):
    flow = residual_flow(llama, FACTS[0], blocks=[1, 2])
    for other in (residual_flow(llama, FACTS[1], blocks=[1, 2]), residual_flow(llama, FACTS[0], blocks=[2])):
        with pytest.raises(ValueError, match="other facts or blocks"):
            project({"one": flow, "two": other})
    with pytest.raises(ValueError, match="no flow"):
        project({})
    with pytest.raises(ValueError, match="not read at block 3"):
        project(flow, 3)
    with pytest.raises(ValueError, match="no fact 1"):
        project(flow, fact=1)


@pytest.mark.real
def test_where_the_model_has_the_object_it_stands_nearer_to_its_anchor_than_to_others_on_smollm2(smollm2_folder):
    """In a late block; further down anchors tell relations apart before they tell objects."""
    model = EditableModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    facts = [
        Fact("Germany", "The capital of {} is", "Berlin"),
        Fact("Tiger Woods", "{} plays the sport of", "golf"),
    ]
    flow = residual_flow(model, facts, blocks=[2, 26, 29], others=4)
    assert len(flow.others) == 4
    for fact in flow.facts:
        assert fact.references >= 3, fact.fact.question
        assert fact.clean.raw.above[1] > 0.05, str(flow)
        assert fact.clean.centred.above[1] > 0.2, str(flow)
        assert fact.clean.new.rank[-1] == 1 < fact.clean.new.rank[0]
