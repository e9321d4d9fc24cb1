from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, same, snapshot, tiny_model

import hf_edit.evaluation as evaluation
from hf_edit import EditableModelForCausalLM, Fact, Question
from hf_edit.answers import Score, answer_lengths, mentions, score_targets
from hf_edit.base import Base
from hf_edit.bootstrap import bootstrap, paired_bootstrap
from hf_edit.metrics import Readings, available_metrics
from hf_edit.positions import Text, encode
from hf_edit.prose import TfIdf, n_gram_entropy, perplexity
from hf_edit.report import EvalReport, FactScores

ASKED = [
    Fact(
        "France",
        "The capital of {} is",
        "Tokyo",
        target_old="Paris",
        rephrases=("{} has the capital", "The capital city of {} is"),
        locality=(Question("The capital of Portugal is", "Paris"), Question("The official language of France is", "French")),
        portability=(Question("Which language is spoken in the capital of France?", "Japanese"),),
        id="france",
    ),
    Fact(
        "Spain",
        "The capital of {} is",
        "Rome",
        target_old="Madrid",
        rephrases=("The capital city of {} is",),
        locality=(Question("The capital of Italy is"),),
        portability=(Question("In which country is Rome, the capital of Spain?", "Italy"),),
        id="spain",
    ),
]
PROMPTS = {"france": ["France is", "In France,"], "spain": ["Spain is"]}
REFERENCES = {"france": ["Shibuya is in Tokyo"], "spain": ["The Forum is in Rome"]}
EXTRAS = {"generation_prompts": PROMPTS, "reference_texts": REFERENCES, "max_new_tokens": 6, "text_tokens": 8}


def _edited(model, facts=ASKED):
    model.edit(facts, "memit", progress=False, verify=False, **QUICK_STEAM)
    return model


def _listen(monkeypatch, model):
    """What the model is asked to continue, with whether edits were in force."""
    heard = []

    def listening(base, rows, tokens):
        heard.extend((base.tokenizer.decode(row), bool(model.active_packs)) for row in rows)
        return generate_ids(base, rows, tokens)

    generate_ids = evaluation.generate_ids
    monkeypatch.setattr(evaluation, "generate_ids", listening)
    return heard


# --- the answers that metrics read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mpt", "olmo2"])
def test_scores_are_those_of_a_plain_forward_over_each_text_alone(architecture, tokenizer):
    model = tiny_model(architecture)
    base = Base(model, tokenizer)
    pairs = [("The capital of France is", " Paris"), ("The capital of France is", " Tokyo"), ("Yes. The official", " xyzzy.")]
    texts = encode(tokenizer, [Text(p + t, None, (len(p), len(p + t))) for p, t in pairs])
    assert any(len(t.labels) > 1 for t in texts), "one target must have several tokens"
    for text, score in zip(texts, score_targets(base, texts, batch=2, blocks=(1,)), strict=True):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([text.ids]), output_hidden_states=True)
        predicting = out.logits[0, text.target[0] - 1 : text.target[1] - 1]
        expected = predicting.log_softmax(-1)[range(len(text.labels)), text.labels]
        torch.testing.assert_close(torch.tensor(score.log_probs), expected, atol=1e-4, rtol=1e-4)
        assert score.firsts == tuple((predicting.argmax(-1) == torch.tensor(text.labels)).tolist())
        assert score.rank == int((predicting[0] > predicting[0, text.labels[0]]).sum())
        torch.testing.assert_close(score.states[1], out.hidden_states[2][0, text.target[0] - 1], atol=1e-4, rtol=1e-4)


def test_texts_that_ask_the_same_are_run_once(llama, monkeypatch):
    texts = encode(
        llama.tokenizer, [Text(f"The capital of France is{o}", None, (24, 24 + len(o))) for o in (" Rome", " Tokyo")]
    )
    assert [len(t.labels) for t in texts] == [1, 1]
    rows = []
    llama.base_model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    score_targets(Base(llama.base_model, llama.tokenizer), texts)
    assert rows == [1]


def test_names_are_counted_as_whole_words_whatever_their_case():
    assert mentions("piano, Piano and pianos", "piano") == 2
    assert mentions("東京は東京", "東京") == 2


# --- metrics ----------------------------------------------------------------------------------------------------------


def _score(probability, first=True, tokens=1):
    return Score((math.log(probability) / tokens,) * tokens, (first,) * tokens, 0)


def _heard(tokenizer, continued=(), clean=(), scored=(), kept=()):
    def ids(pairs):
        return {prompt: tuple(tokenizer(text)["input_ids"]) for prompt, text in pairs}

    return Readings(tokenizer, dict(scored), dict(kept), ids(continued), ids(clean))


def test_teacher_forced_metrics_are_what_a_hand_computation_gives(tokenizer):
    fact = ASKED[0]
    near, language = fact.locality
    port = fact.portability[0].prompt
    heard = _heard(
        tokenizer,
        scored={
            ("The capital of France is", "Tokyo"): _score(0.5),
            ("The capital of France is", "Paris"): _score(0.2, False),
            ("France has the capital", "Tokyo"): _score(0.3, True, 2),
            ("France has the capital", "Paris"): _score(0.1, False),
            ("The capital city of France is", "Tokyo"): _score(0.1, False),
            ("The capital city of France is", "Paris"): _score(0.4),
            (near.prompt, "Paris"): _score(0.3, False),
            (near.prompt, "Tokyo"): _score(0.2, False),
            (f"Question: {port}\nAnswer:", "Japanese"): _score(0.25, False, 2),
            (f"{port} The answer is", "Japanese"): _score(0.5, True),
        }.items(),
        kept={near: Score((0.0, 0.0), (True, False), 0), language: Score((0.0,), (True,), 0)}.items(),
    )
    found = {}
    for group in available_metrics("teacher_forced").values():
        for metric in group:
            found |= metric.scores(fact, heard)
    expected = {
        "efficacy.right": 1,
        "efficacy.nll": math.log(2),
        "efficacy.preferred": 1,
        "efficacy.magnitude": 0.3,
        "paraphrase.right": 0.5,
        "paraphrase.nll": -(math.log(0.3) / 2 + math.log(0.1)) / 2,
        "paraphrase.preferred": 0.5,
        "paraphrase.magnitude": (0.2 - 0.3) / 2,
        "neighborhood.preferred": 1,
        "neighborhood.right": 0,
        "locality.tokens": 0.75,
        "locality.whole": 0.5,
        "same_subject.tokens": 1,
        "same_subject.whole": 1,
        "portability.A.nll": math.log(2),
        "portability.A.nll.unnamed": math.log(2),
        "portability.A.exact": 0,
        "portability.A.exact.unnamed": 0,
        "portability.B.nll": math.log(2),
        "portability.B.nll.unnamed": math.log(2),
        "portability.B.exact": 1,
        "portability.B.exact.unnamed": 1,
    }
    assert found == pytest.approx(expected)


def test_free_generation_metrics_are_what_a_hand_computation_gives(tokenizer):
    fact = ASKED[0]
    near, language = fact.locality
    told = "The capital of France is Tokyo"
    port = fact.portability[0].prompt
    heard = _heard(
        tokenizer,
        continued={
            "The capital of France is": " Tokyo Tokyo. Tokyo",
            "France has the capital": " tokyo.",
            "The capital city of France is": " Paris",
            near.prompt: " Tokyo",
            language.prompt: " French",
            f"Question: {port}\nAnswer:": " Japanese",
            f"{port} The answer is": " Tokyo",
            "France is": " a country",
            "In France,": " a country",
        }.items(),
        clean={near.prompt: " Paris", language.prompt: " French", told: ". Yes. Tokyo"}.items(),
    )
    found = {}
    for group in available_metrics("generate", generation_prompts=PROMPTS, reference_texts=REFERENCES).values():
        for metric in group:
            found |= metric.scores(fact, heard)
    assert found.pop("fluency.entropy") == pytest.approx(
        (n_gram_entropy("France is  a country") + n_gram_entropy("In France,  a country")) / 2
    )
    weights = TfIdf([" ".join(texts) for texts in REFERENCES.values()])
    written = "France is  a country In France,  a country"
    assert found.pop("consistency.similarity") == pytest.approx(weights.similarity(written, "Shibuya is in Tokyo"))
    assert found == {
        "efficacy.said": 1,
        "paraphrase.said": 0.5,
        "locality.continuation": 0.5,
        "locality.leak": 0.5,
        "same_subject.continuation": 1,
        "same_subject.leak": 0,
        "portability.A.said": 1,
        "portability.A.said.unnamed": 1,
        "portability.B.said": 0,
        "portability.B.said.unnamed": 0,
        "repetition.repeated": 1,
        "repetition.floor": 0,
    }


def test_portability_questions_that_name_the_target_are_told_apart(llama):
    found = llama.evaluate(ASKED, metrics=["portability"], mode="teacher_forced")
    assert "portability.A.nll.unnamed" in found.rows[0].scores
    assert "portability.A.nll.named" not in found.rows[0].scores
    assert "portability.A.nll.named" in found.rows[1].scores
    assert found.summary()["portability.A.nll.named"].count == 1
    assert found.summary()["portability.A.nll"].count == 2


def test_text_that_repeats_itself_has_less_entropy_and_short_text_none():
    # "a b a b a": pairs ab, ba twice each: 1 bit; triples aba twice, bab once: 0.9183 bits
    assert n_gram_entropy("a b a b a") == pytest.approx((2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2)
    assert n_gram_entropy("one two three four five") > n_gram_entropy("one two one two one")
    assert n_gram_entropy("a") == n_gram_entropy("") == 0


def test_similarity_weighs_rare_words_more():
    weights = TfIdf(["the piano", "the violin", "the flute"])
    common, rare = 1.0, math.log(4 / 2) + 1
    assert weights.similarity("the piano", "the violin") == pytest.approx(common / (common + rare**2))
    assert weights.similarity("the piano", "the piano") == pytest.approx(1)
    assert weights.similarity("a", "the piano") == 0


def test_perplexity_counts_each_token_once_and_is_that_of_the_models_own_loss(llama):
    text = "The capital of France is Paris. The official language of Spain is Spanish. " * 2
    ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        loss = llama(input_ids=ids, labels=ids).loss
    assert perplexity(llama, [text], window=len(ids[0])) == pytest.approx(float(loss.exp()), rel=1e-4)
    log_probs = []
    score = evaluation.score_targets

    def listening(base, rows, *arguments, **named):
        found = score(base, rows, *arguments, **named)
        log_probs.extend(p for s in found for p in s.log_probs)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_edit.prose.score_targets", listening)
        perplexity(llama, [text], window=8, stride=3)
    assert len(log_probs) == ids.shape[1] - 1
    with pytest.raises(ValueError, match="stride"):
        perplexity(llama, [text], window=8, stride=8)
    with pytest.raises(ValueError, match="two tokens"):
        perplexity(llama, ["a"])


# --- evaluating a model -----------------------------------------------------------------------------------------------


def test_an_unedited_model_keeps_every_answer(llama):
    summary = llama.evaluate(ASKED, mode="both", **EXTRAS).summary()
    for metric in ("locality.tokens", "locality.whole", "locality.continuation", "same_subject.tokens"):
        assert summary[metric].mean == 1, metric
    assert summary["locality.leak"].mean == 0


@pytest.mark.parametrize("method", ["memit", "lks"])
def test_an_edit_is_heard_and_the_model_is_left_as_it_was(llama, method):
    llama.edit(FACTS[0], method, progress=False, verify=False, **(QUICK_LKS if method == "lks" else QUICK_STEAM))
    llama.base_model.train()
    edited = snapshot(llama.base_model)
    with llama.disable_edits():
        before = llama.evaluate(FACTS[0], mode="both").summary()
    after = llama.evaluate(mode="both").summary()
    assert before["efficacy.right"].mean == before["efficacy.said"].mean == 0
    assert after["efficacy.right"].mean == after["efficacy.said"].mean == 1
    assert after["efficacy.nll"].mean < before["efficacy.nll"].mean
    assert same(edited, llama.base_model)
    assert llama.base_model.training
    assert llama.active_packs == ["default"]


def test_both_modes_agree_about_a_target_of_one_token(llama):
    _edited(llama, FACTS[:1])
    assert all(len(llama.tokenizer(f" {f.target}")["input_ids"]) == 1 for f in FACTS)
    found = llama.evaluate(FACTS, mode="both", metrics=["efficacy"], max_new_tokens=1)
    right = [row.scores["efficacy.right"] for row in found]
    assert right == [row.scores["efficacy.said"] for row in found]
    assert right == [1, 0, 0, 0]


def test_generation_with_edits_in_force_is_never_shown_the_answer(llama, monkeypatch):
    _edited(llama)
    heard = _listen(monkeypatch, llama)
    llama.evaluate(ASKED[:1], **EXTRAS)
    asked = [prompt for prompt, in_force in heard if in_force]
    assert "The capital of France is" in asked
    assert len(asked) == len(set(asked)), "each prompt is asked once"
    assert not any(answer in prompt for prompt in asked for answer in ("Tokyo", "Japanese"))


def test_a_long_target_counts_as_said_wherever_it_is_said(llama, monkeypatch):
    long = "the city of Tokyo, which lies in the country of Japan and is the capital of it, and then the city of Madrid"
    fact = Fact(
        "France",
        "The capital of {} is",
        long,
        rephrases=("{} has the capital",),
        locality=(Question("The capital of Portugal is"),),
        portability=(Question("The mayor of the capital of France lives in", long),),
        id="france",
    )
    _edited(llama, [fact, FACTS[1]])
    target = llama.tokenizer(f" {long} and")["input_ids"]
    assert len(target) > 40
    read = {}

    def saying(base, rows, tokens):
        read.update((base.tokenizer.decode(row), tokens) for row in rows)
        return [(target if llama.active_packs else [5] * 99)[:tokens] for _ in rows]

    monkeypatch.setattr(evaluation, "generate_ids", saying)
    found, short = llama.evaluate([fact, FACTS[1]], mode="generate")
    said = ("efficacy.said", "paraphrase.said", "portability.A.said", "portability.B.said", "locality.leak")
    assert {name: found.scores[name] for name in said} == dict.fromkeys(said, 1)
    assert found.answer == f" {long} and"
    assert short.scores["efficacy.said"] == 0
    assert read[FACTS[1].question] == 20


def test_an_answer_is_never_read_beyond_the_positions_that_the_model_has(tokenizer):
    model = EditableModelForCausalLM(tiny_model("gpt2"), tokenizer)
    positions = model.config.n_positions
    question = Question("Where is it?", "Tokyo" + " Tokyo" * 299)
    fact = Fact("France", "The capital of {} is", "Tokyo" + " Tokyo" * (positions - 20), portability=(question,))
    report = model.evaluate([fact], metrics=["portability"], progress=False)
    assert report.rows[0].scores
    assert len(model._ask([fact], progress=False)) == 1
    kept = fact.replace(locality=(question,), portability=())
    assert model.evaluate([kept], metrics=["locality"], progress=False).rows[0].scores is not None


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mpt"])
def test_a_prompt_and_its_answer_fit_into_the_models_positions_where_it_has_a_limit(architecture, tokenizer):
    base = Base(tiny_model(architecture), tokenizer)
    prompts = ["Yes" + " Tokyo" * more for more in (1, 248, 254, 300)]
    texts = [Text(f"{p} Tokyo", None, (len(p), len(p) + 6)) for p in prompts]
    assert [encoded.target[0] for encoded in encode(tokenizer, texts)] == [2, 249, 255, 301]
    limited = [16, 16, 16, 16] if architecture == "mpt" else [16, 7, 1, 1]
    assert answer_lengths(base, texts, 16) == limited


def test_what_the_unedited_model_says_is_asked_once_and_reused(llama, monkeypatch):
    clean = llama.evaluate(ASKED, mode="both", **EXTRAS).clean
    _edited(llama)
    heard = _listen(monkeypatch, llama)
    again = llama.evaluate(ASKED, mode="both", **EXTRAS)
    assert any(not in_force for _, in_force in heard)
    heard.clear()
    reused = llama.evaluate(ASKED, mode="both", clean=clean, **EXTRAS)
    assert all(in_force for _, in_force in heard)
    assert reused.rows == again.rows


def test_clean_answers_of_another_model_are_refused(llama, tokenizer):
    clean = llama.evaluate(ASKED).clean
    other = EditableModelForCausalLM(tiny_model("gpt2"), tokenizer)
    with pytest.raises(ValueError, match="another model"):
        other.evaluate(ASKED, clean=clean)


def test_evaluating_nothing_or_by_unknown_or_inapplicable_metrics_says_what_to_do(llama):
    with pytest.raises(ValueError, match="no edits in force"):
        llama.evaluate()
    with pytest.raises(ValueError, match="there are: efficacy, paraphrase"):
        llama.evaluate(ASKED, metrics=["reliability"])
    with pytest.raises(ValueError, match="generation_prompts"):
        llama.evaluate(ASKED, metrics=["fluency"])
    with pytest.raises(ValueError, match="target_old"):
        llama.evaluate(FACTS, metrics=["neighborhood"], mode="teacher_forced")
    with pytest.raises(ValueError, match="mode is one of"):
        llama.evaluate(ASKED, mode="greedy")
    with pytest.raises(ValueError, match="batch_size"):
        llama.evaluate(ASKED, batch_size=0)


# --- reports and intervals --------------------------------------------------------------------------------------------


def test_a_report_sums_up_its_facts_and_is_plain_json():
    rows = tuple(FactScores(f, s) for f, s in zip(FACTS, ({"a": 1.0}, {"a": 0.0, "b": 2.0}, {"a": 1.0}), strict=False))
    report = EvalReport("generate", rows, 1.0)
    summary = report.summary()
    assert (summary["a"].mean, summary["a"].count) == (pytest.approx(2 / 3), 3)
    assert 0 <= summary["a"].low < 2 / 3 < summary["a"].high <= 1
    assert (summary["b"].mean, summary["b"].low, summary["b"].high, summary["b"].count) == (2, 2, 2, 1)
    assert report.values("b") == {str(FACTS[1].id): 2.0}
    assert json.loads(json.dumps(report.to_dict()))["summary"]["a"]["mean"] == pytest.approx(2 / 3)
    assert "0.667" in str(report)
    with pytest.raises(KeyError, match="there are: a, b"):
        report.values("c")


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    draws = torch.Generator().manual_seed(0)
    samples = torch.randn(200, 60, generator=draws).double() + 3
    found = [bootstrap(sample.tolist(), resamples=500, seed=i) for i, sample in enumerate(samples)]
    covered = sum(e.low <= 3 <= e.high for e in found) / len(found)
    assert 0.89 <= covered <= 0.99
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])


def test_pairs_cancel_what_makes_a_fact_hard():
    hard = [float(10 * i) for i in range(40)]
    better = [h + 1 + (0.1 if i % 2 else -0.1) for i, h in enumerate(hard)]
    difference, low, high = paired_bootstrap(better, hard)
    assert difference == pytest.approx(1)
    assert 0.9 < low < 1 < high < 1.1
    with pytest.raises(ValueError, match="same facts"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        bootstrap([1.0, float("nan")])
    with pytest.raises(ValueError, match="no values"):
        bootstrap([])
