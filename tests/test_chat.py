"""Chats: what a template puts around a turn, facts that are asked in one, and what the report says of them."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, TEMPLATE, tiny_model
from tokenizers import processors

from hf_edit import EditableModelForCausalLM, Fact, LKSConfig
from hf_edit.lm import chat_forms as chat_forms_module
from hf_edit.lm.chat import chat_frame, chat_text
from hf_edit.lm.chat_forms import asked_plainly, chat_forms, chat_frames, given_chat, natural_answers, worded_answer
from hf_edit.lm.paraphrases import paraphrases, statement, wordings_in_chat
from hf_edit.methods.lks import training
from hf_edit.methods.lks.examples import build_examples
from hf_edit.positions import Text, encode, fact_text
from hf_edit.questions import asked_afterwards, asked_in_chat, is_question, other_wordings
from hf_edit.suffix import frozen
from hf_edit.weights.prompts import fact_texts

TRIMMING = TEMPLATE.replace("m['content']", "m['content'] | trim")
INSTRUCT = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
PARTS = TEMPLATE.replace("{{ m['content'] }}", "{% for c in m['content'] %}{{ c.text }}{% endfor %}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE


@pytest.fixture
def model(chatty):
    return EditableModelForCausalLM(tiny_model("llama"), chatty)


def _rendered(tokenizer, *turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


# --- frames -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING, NO_SYSTEM, INSTRUCT])
@pytest.mark.parametrize("turn", ["Where is Rome?", "  two blanks before\n"])
def test_a_frame_puts_a_turn_where_the_template_does(chatty, template, turn):
    chatty.chat_template = template
    frame = chat_frame(chatty)
    assert frame.around(Text(turn)).text == _rendered(chatty, turn)
    assert frame.trims == (template in (TRIMMING, INSTRUCT))
    assert (chat_frame(chatty, "Be kind.") is None) == (template == NO_SYSTEM)


def test_a_template_that_takes_contents_in_parts_gets_them_and_one_that_drops_them_is_refused(chatty):
    chatty.chat_template = PARTS
    turns = [{"role": "user", "content": "Where is Rome?"}]
    assert chat_text(chatty, turns).text == "<s>user\nWhere is Rome?<s>\n<s>assistant\n"
    chatty.chat_template = "fixed text"
    with pytest.raises(ValueError, match="leaves out what the last message says"):
        chat_text(chatty, turns)


def test_a_frame_with_a_system_prompt_holds_it(chatty):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert chat_frame(chatty, "Be kind.").around(Text("Hello")).text == chat_text(chatty, messages).text


def test_without_a_usable_template_there_is_no_frame(chatty, tokenizer):
    assert chat_frame(tokenizer) is None
    for template in ("{{ raise_exception('never') }}", "{{ nothing.at.all }}", "fixed text"):
        chatty.chat_template = template
        assert chat_frame(chatty) is None


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMING])
def test_spans_in_a_frame_are_those_of_the_words(chatty, template):
    chatty.chat_template = template
    text = chat_frame(chatty).around(fact_text(FACTS[0], prompt=" Name the capital of {}, please. "), "It is Tokyo.")
    assert text.text[slice(*text.subject)] == "France"
    assert text.text[slice(*text.target)] == "It is Tokyo.<s>"


def test_a_chat_gets_no_special_tokens_beside_those_of_its_template(bos_tokenizer):
    chatty = copy.deepcopy(bos_tokenizer)
    chatty.chat_template = TEMPLATE
    text = chat_frame(chatty).around(Text("Hello"))
    assert encode(chatty, [text, Text("Hello")])[0].ids == tuple(
        chatty.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)["input_ids"]
    )
    assert encode(chatty, [text, Text("Hello")])[1].ids == tuple(chatty("Hello")["input_ids"])


# --- facts --------------------------------------------------------------------------------------------------------------


def test_a_prompt_keeps_the_blanks_at_its_ends():
    prompt = "Q: Where does {} live?\nA:\n"
    fact = Fact("Ann", prompt, "Oslo", rephrases=["{}'s home:\n"])
    assert fact.prompt == prompt
    assert fact.rephrases == ("{}'s home:\n",)
    assert Fact.from_dict(fact.to_dict()) == fact
    assert fact_text(fact, target="Oslo").text == "Q: Where does Ann live?\nA:\nOslo"


@pytest.mark.parametrize("end", ["", "\n", " ", "\n\n", " \n", "\t"])
def test_a_target_is_learnt_behind_the_tokens_that_the_prompt_has_by_itself(tokenizer, end):
    fact = Fact("France", "The capital of {} is" + end, "Tokyo")
    whole = encode(tokenizer, [fact_text(fact, target=fact.target)])[0]
    assert whole.ids[: whole.target[0]] == tuple(tokenizer(fact.question)["input_ids"])
    assert tokenizer.decode(whole.labels).strip() == "Tokyo"
    assert tokenizer.decode(whole.ids) == fact_text(fact, target=fact.target).text


@pytest.mark.parametrize("trimming", [True, False])
def test_a_blank_at_a_prompts_end_is_a_token_also_where_its_offsets_are_trimmed(tokenizer, trimming):
    trimmed = copy.deepcopy(tokenizer)
    trimmed.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimming)
    ids = tuple(trimmed("The capital of France is ")["input_ids"])
    assert encode(trimmed, [Text("The capital of France is ")])[0].ids == ids
    whole = encode(trimmed, [fact_text(Fact("France", "The capital of {} is ", "Tokyo"), target="Tokyo")])[0]
    assert whole.ids[: whole.target[0]] == ids


def test_questions_are_known_from_sentences_to_be_completed():
    assert is_question("Where does {} live?")
    assert is_question("{}はどこにいますか？")
    assert not is_question("{} lives in")
    assert not is_question("{} lives in\n")


@pytest.mark.parametrize(
    "prompt", ["The capital of {} is", "{} lives in", "What does the frumious {} do?", "The zorb of {} is"]
)
def test_what_a_fact_is_asked_in_afterwards_it_is_never_fitted_in(prompt):
    fact = Fact("Ann", prompt, "Oslo")
    fitted = asked_in_chat(fact, 100)
    assert len(fitted) == 100
    assert all(wording.count("{}") == 1 for wording in fitted)
    assert asked_afterwards(fact) not in fitted
    assert asked_afterwards(fact) not in other_wordings(fact)
    assert asked_afterwards(Fact("Ann", prompt + " \n", "Oslo")) == asked_afterwards(fact)
    assert asked_afterwards(fact).count("{}") == 1


def test_a_question_is_asked_as_it_is_and_a_sentence_by_a_question_of_its_relation():
    assert asked_in_chat(Fact("Ann", "Where did {} zorb?", "Oslo"), 2)[0] == "Where did {} zorb?"
    assert is_question(asked_in_chat(FACTS[0], 1)[0])
    assert asked_in_chat(Fact("Ann", "{} zorbed in", "Oslo"), 1)[0].endswith("{} zorbed in")


def test_a_facts_own_paraphrase_is_asked_afterwards():
    fact = Fact("Ann", "{} lives in", "Oslo", rephrases=["{} is at home in", "Where is Ann at home?"])
    assert asked_afterwards(fact) == "Where is {} at home?"
    same = Fact("Ann", "Where does {} zorb?", "Oslo", rephrases=["where does {} zorb? "])
    assert asked_afterwards(same) not in same.rephrases


@pytest.mark.parametrize(
    ("prompt", "others"),
    [
        ("who plays the dad in {}?", {"In {}, who plays the dad?", "Tell me who plays the dad in {}."}),
        ("Who is the father of {}?", {"Who is {}'s father?", "Tell me who the father of {} is."}),
        ("In which year was {} founded?", {"When was {} founded?", "Do you know in which year {} was founded?"}),
        ("{}はどこにいますか？", set()),
        ("{} zorbed in", set()),
    ],
)
def test_a_question_is_asked_in_other_words(prompt, others):
    fact = Fact("Ann", prompt, "Oslo")
    found = paraphrases(fact)
    assert others <= set(found)
    assert bool(found) == bool(others)
    assert all(wording.count("{}") == 1 for wording in (*found, *wordings_in_chat(fact, 20)))
    assert wordings_in_chat(fact, 1) == asked_in_chat(fact, 1)
    assert set(found) <= set(wordings_in_chat(fact, 20))


def test_no_paraphrase_is_what_a_fact_is_asked_in_afterwards():
    fact = Fact(
        "Ann", "Who is the father of {}?", "Tom", rephrases=["Who is Ann's father?", "Tell me who the father of Ann is."]
    )
    assert set(fact.rephrases).isdisjoint(wording.replace("{}", "Ann") for wording in wordings_in_chat(fact, 20))


@pytest.mark.parametrize(
    ("prompt", "target", "said"),
    [
        ("{} lives in", "Oslo", "Ann lives in Oslo"),
        ("Who is the father of {}?", "Tom", "The father of Ann is Tom"),
        ("When was {} born?", "8 April 1892", "Ann was born on 8 April 1892"),
        ("In which year was {} born?", "1892", "Ann was born in 1892"),
        ("Which band was led by {}?", "Zorb", "The band that was led by Ann was Zorb"),
        ("who plays the dad in {}?", "Tom", "The one who plays the dad in Ann is Tom"),
        ("How tall is {}?", "2 m", None),
    ],
)
def test_a_question_and_its_target_make_a_sentence(prompt, target, said):
    assert statement(Fact("Ann", prompt, target)) == said


class _Words:
    """Stands for a tokenizer: a token is a word with the blank in front of it."""

    def decode(self, ids, **_):
        return "".join(ids)

    def __call__(self, text, **_):
        return {"input_ids": text.split()}


@pytest.mark.parametrize(
    ("answer", "likely", "phrased"),
    [
        ("Ann was born in Rome in 1892.", -9.0, "Ann was born in Rome in 1892."),  # it says the target by itself
        ("Ann was born in Paris in 1892.", -0.5, "Ann was born in Rome."),  # the target where it is likeliest
        ("Rome is where Ann was born.", -9.0, "The answer is Rome."),  # no answer begins with the bare target
        ("Where was Ann born? In Paris.", -0.1, "Ann was born in Rome."),  # nor repeats the question
    ],
)
def test_the_target_is_put_into_the_answer_that_the_model_gives(answer, likely, phrased):
    ids = re.findall(r"\s?\S+", answer)
    at = [likely if ids[n - 1] == " in" else -12.0 for n in range(len(ids))]
    question = "What city was Ann born in?" if "The answer" in phrased else "Where was {} born?"
    fact = Fact("Ann", question if "{}" in question else question.replace("Ann", "{}"), "Rome")
    assert chat_forms_module._phrased(_Words(), fact, ids, at) == phrased


def test_an_answer_holds_the_target_whatever_the_model_says(model):
    facts = [*FACTS, Fact("Ann", "How tall is {}?", "2 m"), Fact("Ann", "{}はどこにいますか？", "Oslo")]
    for fact, answer in zip(facts, natural_answers(model._base, facts), strict=True):
        assert fact.target in answer
    assert worded_answer(FACTS[0]) == "The capital of France is Tokyo."
    assert [worded_answer(fact) for fact in facts[-2:]] == ["The answer is 2 m.", "Oslo."]


def test_a_prompt_that_the_template_made_is_known_for_a_chat(chatty):
    frame = chat_frame(chatty)
    rendered = Fact("France", _rendered(chatty, "What is the capital of {}?"), "Tokyo")
    assert asked_plainly(frame, rendered).prompt == "What is the capital of {}?"
    later = Fact("France", _rendered(chatty, "Hello", "Hello!", "What is the capital of {}?"), "Tokyo")
    assert asked_plainly(frame, later).prompt == "What is the capital of {}?"
    assert asked_plainly(frame, FACTS[0]) is FACTS[0]
    unnamed = Fact("France", _rendered(chatty, "I live in {}.", "Nice!", "What is its capital?"), "Tokyo")
    assert asked_plainly(frame, unnamed) is None


def test_the_last_turn_of_a_chat_is_found_where_a_special_token_opens_the_first_one(chatty):
    chatty.chat_template = INSTRUCT
    later = Fact("France", _rendered(chatty, "Hello", "Hello!", "What is the capital of {}?"), "Tokyo")
    assert asked_plainly(chat_frame(chatty), later).prompt.strip() == "What is the capital of {}?"


def test_each_fact_is_asked_and_answered_in_as_many_chats(model):
    forms = chat_forms(model._base, FACTS, 3)
    frames = chat_frames(model._base)
    assert len(frames) == 3
    assert [len(own) for own in forms] == [3] * len(FACTS)
    for fact, own in zip(FACTS, forms, strict=True):
        assert len({form.text for form in own}) == 3
        for form, frame in zip(own, frames, strict=True):
            assert form.text.startswith(frame.before)
            assert form.text[slice(*form.subject)] == fact.subject
            assert fact.target in form.text[slice(*form.target)]
    assert chat_forms(model._base, FACTS, 0) == [()] * len(FACTS)


def test_a_model_without_a_template_is_asked_as_before(llama):
    assert chat_forms(llama._base, FACTS, 3) == [()] * len(FACTS)
    report = llama.edit(FACTS, "memit", progress=False, **QUICK_STEAM)
    assert all(result.chat is None and result.chat_question is None for result in report)
    assert "chat" not in str(report)
    with pytest.raises(ValueError, match="no chat template"):
        llama.ask("Hello", chat=True)
    with pytest.raises(ValueError, match="no chat template"):
        llama.ask([{"role": "user", "content": "Hello"}])


# --- the model ----------------------------------------------------------------------------------------------------------


def test_ask_answers_texts_turns_and_chats(model):
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = _rendered(model.tokenizer, turn[0]["content"])
    plain, again, chat = model.ask(["The capital of France is", rendered, turn], max_new_tokens=8)
    assert [plain] == model.ask("The capital of France is", max_new_tokens=8)
    assert again == chat
    assert model.ask(turn, max_new_tokens=8) == [chat]
    assert model.ask(turn[0]["content"], chat=True, max_new_tokens=8) == [chat]
    assert model.ask([turn, turn], max_new_tokens=8) == [chat, chat]
    model.tokenizer.chat_template = NO_SYSTEM
    with pytest.raises(ValueError, match="refuses these messages"):
        model.ask([{"role": "system", "content": "Be kind."}, *turn])


def test_a_chat_that_the_model_has_no_positions_for_is_left_out_and_the_edit_is_made(chatty):
    chatty.chat_template = TEMPLATE.replace("{% for", "<s>system\n" + "Be kind. " * 80 + "<s>\n{% for", 1)
    model = EditableModelForCausalLM(tiny_model("gpt2"), chatty)
    for method, quick in (("memit", {**QUICK_STEAM, "contexts": 1, "chats": 1}), ("lks", QUICK_LKS)):
        report = model.edit(FACTS, method, progress=False, **quick)
        assert all(result.chat is None and result.said is not None for result in report)
        assert any(r.probability > r.probability_before for r in report)
        model.rollback()


def test_a_prompt_with_line_breaks_takes_one_line_of_the_report(model):
    fact = Fact("France", _rendered(model.tokenizer, "What is the capital of {}?"), "Tokyo")
    report = model.edit(fact, "memit", progress=False, **QUICK_STEAM)
    assert len(str(report).splitlines()) == 3


def test_what_is_no_prompt_is_refused_with_the_way_out(model):
    with pytest.raises(ValueError, match="put this one into a list"):
        model.ask({"role": "user", "content": "Hello"})


def test_the_report_asks_in_the_chat_as_well_and_counts_a_fact_only_where_both_hold(model):
    report = model.edit(FACTS, "memit", progress=False, **QUICK_STEAM)
    for result in report:
        assert result.success == (result.said and result.said_in_chat)
        assert result.chat_question
        frame = chat_frame(model.tokenizer)
        assert result.chat == model.ask(frame.around(Text(result.chat_question)).text, max_new_tokens=32)[0].strip()
    assert str(report).count(" chat: ") == len(FACTS)
    said, in_chat = (sum(getattr(r, name) for r in report) for name in ("said", "said_in_chat"))
    assert f"({said} as given, {in_chat} in the chat)" in str(report)
    row = report.to_dict()["results"][0]
    assert {"said", "said_in_chat", "chat_question", "chat_before", "chat"} <= row.keys()


def test_lks_is_trained_on_answers_in_the_chat(model):
    config = LKSConfig(**QUICK_LKS)
    frames = chat_frames(model._base)
    with frozen(model.base_model):
        plain, chatty = (build_examples(model._base, FACTS, replace(config, chats=chats), 0) for chats in (0, 3))
    for fact, without, own in zip(FACTS, plain.variations, chatty.variations, strict=True):
        assert len(own) == len(without) + 3
        for example in own[-3:]:
            first, last = example.labels[0][0] + 1, example.labels[-1][0] + 1
            begun = model.tokenizer.decode(example.ids[:first])
            assert any(begun.startswith(f.before) and f.between in begun for f in frames)
            assert model.tokenizer.decode([token for _, token in example.labels]).strip() == fact.target
            assert model.tokenizer.decode(example.ids[: example.mentions[0] + 1]).endswith(fact.subject)
            assert (
                max(example.mentions) < first
            )  # where the answer names the subject in front of the target, it is on there, too
            answer = sorted([*example.labels, *example.said])
            assert [at for at, _ in answer] == list(range(answer[0][0], len(example.ids)))
            assert any(at > last for at, _ in example.said)  # what ends the answer
    assert any(len(example.mentions) > 1 for own in chatty.variations for example in own[-3:])


def test_around_a_target_the_model_that_is_given_the_fact_is_the_teacher(model):
    config = LKSConfig(**QUICK_LKS)
    with frozen(model.base_model):
        example = build_examples(model._base, FACTS, config, 0).variations[0][-1]
        cached = training._Cached(model._base, (3,), [example], [0], config, False)
    given = given_chat(model._base, FACTS[0].replace(prompt=asked_in_chat(FACTS[0], 1)[0]))
    told = chat_text(
        model.tokenizer,
        [
            {"role": "system", "content": f"{asked_in_chat(FACTS[0], 1)[0].replace('{}', 'France')} Tokyo."},
            {"role": "user", "content": asked_in_chat(FACTS[0], 1)[0].replace("{}", "France")},
        ],
    )
    assert given == told
    answer = example.ids[example.answer + 1 :]
    before = encode(model.tokenizer, [told])[0].ids
    assert example.told == before
    with torch.no_grad():
        logits = model.base_model(input_ids=torch.tensor([[*before, *answer]])).logits[0].log_softmax(-1)
    for n, (position, token) in enumerate(example.said):
        at = logits[len(before) + position - example.answer - 1]
        tokens, values = (kept[n] for kept in cached.clean[0])
        torch.testing.assert_close(values, at[tokens.long()], atol=1e-4, rtol=1e-4)
        assert cached.heard[0][n] == float(at[token] > training._UNLIKELY)


def test_texts_that_must_stay_are_asked_in_the_chat_as_well(model):
    with frozen(model.base_model):
        kept = build_examples(model._base, FACTS, LKSConfig(**{**QUICK_LKS, "locality_prompts": 2}), 0).locality
    marks = [model.tokenizer.decode(example.ids).count("<s>assistant") for own in kept for example in own]
    assert sorted(marks) == [0] * 4 + [1] * 4


def test_weight_edits_are_fitted_in_as_many_chats_as_they_are_told_to(model):
    with frozen(model.base_model):
        contexts = ["It rains. ", "Once more. ", "At last. "]
        texts = fact_texts(model._base, FACTS, contexts, chats=2)
        keys = fact_texts(model._base, FACTS, contexts, chats=2, keys_only=True)
    for fact, own, bare in zip(FACTS, texts, keys, strict=True):
        assert len(own.rewrites) == 1 + 1 + 2
        for text, key in zip(own.rewrites, bare.rewrites, strict=True):
            assert text.ids[: text.subject + 1] == key.ids[: key.subject + 1]
        assert [fact.target in model.tokenizer.decode(text.labels) for text in own.rewrites] == [True] * 4
