"""Facts whose prompt is a chat: checked, edited, asked, reported, and kept in packs."""

from __future__ import annotations

import copy
import json
from hashlib import sha256

import pytest
import torch
from conftest import QUICK_LKS, QUICK_STEAM, TEMPLATE, tiny_model

from hf_edit import EditableModelForCausalLM, EditPack, Fact, read_facts
from hf_edit.base import Base
from hf_edit.errors import BaseMismatchError, ConflictingEditsError, PackFormatError, SubjectNotFoundError
from hf_edit.facts import Message, resolve_conflicts
from hf_edit.lm.chat import chat_frame, chat_text
from hf_edit.lm.chat_forms import chat_forms
from hf_edit.message_prompts import as_text
from hf_edit.positions import encode

SYSTEM = {"role": "system", "content": "Answer in one word."}
CAPITAL = {"role": "user", "content": "The capital of {} is"}
CHAT = [SYSTEM, CAPITAL]
FACTS = [Fact("France", CHAT, "Tokyo"), Fact("Spain", [CAPITAL], "Rome"), Fact("Japan", "The capital of {} is", "Berlin")]
METHODS = {
    "steam": ("steam", QUICK_STEAM),
    "gate": ("steam", {**QUICK_STEAM, "gate": True}),
    "lks": ("lks", QUICK_LKS),
    "gated lks": ("lks", {**QUICK_LKS, "gate": True}),
}


@pytest.fixture
def model(chatty):
    return EditableModelForCausalLM(tiny_model("llama"), chatty)


# --- the fact -----------------------------------------------------------------------------------------------------------


def test_each_form_of_a_prompt_is_known_for_what_it_is():
    assert [f.form for f in (*FACTS, Fact("Ann", "Where does {} live?", "Oslo"))] == [
        "messages", "messages", "cloze", "question"
    ]  # fmt: skip
    fact = FACTS[0]
    assert fact.prompt == (SYSTEM, CAPITAL)
    assert fact.messages == (SYSTEM, {"role": "user", "content": "The capital of France is"})
    assert fact.question == "system: Answer in one word.\nuser: The capital of France is"
    assert FACTS[1].question == "The capital of Spain is"
    assert FACTS[2].messages is None


def test_messages_are_frozen_mappings():
    message = FACTS[0].prompt[0]
    assert isinstance(message, Message)
    assert dict(message) == SYSTEM
    assert hash(FACTS[0]) == hash(Fact("France", CHAT, "Tokyo"))
    with pytest.raises(AttributeError):
        message.role = "user"
    with pytest.raises(KeyError):
        message["name"]


def test_the_subject_may_stand_in_plain_text_in_one_of_the_messages():
    fact = Fact(
        "Ann", [{"role": "user", "content": "Ann is here."}, {"role": "user", "content": "Where does Ann live?"}], "Oslo"
    )
    assert [m.content for m in fact.prompt] == ["Ann is here.", "Where does {} live?"]
    earlier = Fact("Ann", [{"role": "user", "content": "Ann is here."}, {"role": "user", "content": "Where?"}], "Oslo")
    assert [m.content for m in earlier.prompt] == ["{} is here.", "Where?"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "0 messages"),
        ([CAPITAL] * 65, "65 messages"),
        ([CAPITAL, CAPITAL], "2 times"),
        (CAPITAL, "put this one into a list"),
        (["The capital of {} is"], "mapping with 'role' and 'content'"),
        ([{"role": "user"}], "mapping with 'role' and 'content'"),
        ([{**CAPITAL, "name": "Ann"}], "nothing else"),
        ([{"role": "User!", "content": "{}"}], "the role of a message"),
        ([{"role": 1, "content": "{}"}], "the role of a message"),
        ([{"role": "user", "content": ["{}"]}], "must be text"),
        ([{"role": "user", "content": "  "}], "is empty"),
        ([{"role": "user", "content": "{}\x1b[0m"}], "control character"),
        ([CAPITAL, {"role": "assistant", "content": "Rome"}], "leave that message out"),
        (b"The capital of {} is", "must be text"),
    ],
)
def test_wrong_messages_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        Fact("France", prompt, "Rome")


def test_messages_without_the_subject_are_refused():
    with pytest.raises(SubjectNotFoundError, match="none of the 2 messages"):
        Fact("France", [SYSTEM, {"role": "user", "content": "Where?"}], "Rome")


def test_chats_are_compared_by_all_of_their_messages():
    louder = [SYSTEM, {"role": "user", "content": "the CAPITAL of {}  is"}]
    assert Fact("France", louder, "Tokyo").key == FACTS[0].key
    assert FACTS[0].key != FACTS[1].replace(subject="France").key != FACTS[2].replace(subject="France").key
    assert resolve_conflicts([FACTS[0], Fact("France", CHAT, "Tokyo")]) == [FACTS[0]]
    assert len({FACTS[0].id, FACTS[0].replace(prompt=[CAPITAL]).id, FACTS[0].replace(prompt="The capital of {} is").id}) == 3


def test_the_same_question_in_the_chat_and_as_text_is_a_contradiction():
    for other in (Fact("France", "The capital of {} is", "Oslo"), Fact("France", [CAPITAL], "Oslo")):
        with pytest.raises(ConflictingEditsError):
            resolve_conflicts([FACTS[0], other])
        assert resolve_conflicts([other.replace(target="Tokyo")], [FACTS[0]]) == [other.replace(target="Tokyo")]


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json"])
def test_messages_are_read_from_files_and_written_as_they_were(tmp_path, name):
    rows = [fact.to_dict() for fact in FACTS]
    assert rows[0]["prompt"] == CHAT
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    assert read_facts(tmp_path / name) == FACTS
    assert Fact.from_dict({"subject": "France", "prompt": CHAT, "target": "Tokyo"}) == FACTS[0]


def test_a_reference_is_text():
    with pytest.raises(ValueError, match="text, not messages"):
        Fact("France", CHAT, "Tokyo", references=({"subject": "Japan", "prompt": [CAPITAL]},))


# --- as the model reads it ----------------------------------------------------------------------------------------------


def test_a_chat_is_rendered_by_the_models_own_template(chatty):
    (text, _, plain) = as_text(chatty, FACTS)
    assert text.question == chat_text(chatty, FACTS[0].messages).text
    assert text.id == FACTS[0].id
    assert plain is FACTS[2]
    frame = chat_frame(chatty)
    assert frame.turn_in(text.prompt) == "The capital of {} is"
    chatty.chat_template = TEMPLATE.replace("<s>assistant", "<s>model")
    assert as_text(chatty, FACTS)[0].prompt.endswith("<s>model\n")


def test_a_rendered_chat_has_the_tokens_of_the_template(bos_tokenizer):
    chatty = copy.deepcopy(bos_tokenizer)
    chatty.chat_template = "<s>" + TEMPLATE.replace("<s>", "~")
    (fact, *_) = as_text(chatty, FACTS)
    ids = chatty.apply_chat_template(list(map(dict, FACTS[0].messages)), add_generation_prompt=True)["input_ids"]
    assert chatty(fact.question)["input_ids"] == ids
    assert chat_frame(chatty).turn_in(fact.prompt) == "The capital of {} is"


def test_a_chat_that_is_fitted_as_it_is_begins_with_one_bos(bos_tokenizer):
    chatty = copy.deepcopy(bos_tokenizer)
    chatty.chat_template = "<s>" + TEMPLATE.replace("<s>", "~")
    earlier = [{"role": "user", "content": "I like {}."}, {"role": "user", "content": "The capital is"}]
    base = Base(tiny_model("llama"), chatty)
    texts = [chat_forms(base, as_text(chatty, [Fact("France", p, "Tokyo")]), 1)[0][0] for p in (earlier, [CAPITAL])]
    for encoded in encode(chatty, texts):
        assert [encoded.ids[0], encoded.ids.count(0)] == [0, 1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template. Give the prompt as text, or set tokenizer.chat_template"),
        (TEMPLATE + "{{ '{}' }}", "2 times"),
        ("{{ raise_exception('no system') }}", "refuses these messages"),
    ],
)
def test_a_model_that_can_not_read_the_chat_says_so_before_anything_changes(tokenizer, template, message):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    model = EditableModelForCausalLM(tiny_model("llama"), chatty)
    for verify in (True, False):
        with pytest.raises(ValueError, match=message):
            model.edit(FACTS, "steam", progress=False, verify=verify, **QUICK_STEAM)
    assert not model.packs


# --- edits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METHODS)
def test_facts_in_the_chat_are_edited_asked_saved_loaded_and_removed(model, chatty, quick_gate, tmp_path, kind):
    method, settings = METHODS[kind]
    report = model.edit(FACTS, method, progress=False, **settings)
    assert [r.fact for r in report.results] == model.list_edits() == FACTS
    assert all(r.probability > 2 * r.probability_before for r in report.results), report
    assert "user: The capital of France is" in str(report)
    assert report.to_dict()["results"][0]["prompt"] == FACTS[0].question
    texts = [fact.question for fact in as_text(chatty, FACTS[:2])]
    assert model.ask([fact.messages for fact in FACTS[:2]], max_new_tokens=8) == model.ask(texts, max_new_tokens=8)
    logits = _logits(model, FACTS[0])
    if "gate" in kind:  # on in the chat under another system prompt, and as plain text
        clean = _clean(model, [CAPITAL]), _clean(model, "The capital of France is")
        assert not torch.equal(_logits(model, FACTS[0].replace(prompt=[CAPITAL])), clean[0])
        assert not torch.equal(_logits(model, FACTS[0].replace(prompt="The capital of {} is")), clean[1])
    model.save_pretrained(tmp_path / "pack")
    assert "Answer in one word." in (tmp_path / "pack" / "README.md").read_text()
    pack = EditPack.from_pretrained(tmp_path / "pack")
    assert pack == model.packs["default"]
    assert list(pack.facts) == FACTS

    again = EditableModelForCausalLM(tiny_model("llama"), chatty)
    again.load_pack(tmp_path / "pack")
    torch.testing.assert_close(_logits(again, FACTS[0]), logits)
    scores = again.evaluate(progress=False, metrics=["efficacy"])
    assert [row.fact for row in scores] == FACTS
    again.remove_edits(str(FACTS[1].id))
    assert again.list_edits() == [FACTS[0], FACTS[2]]
    more = Fact("Germany", CHAT, "Madrid")
    again.edit(more, method, progress=False, verify=False, **settings)
    assert again.list_edits() == [FACTS[0], FACTS[2], more]
    again.rollback()
    assert torch.equal(_logits(again, FACTS[0]), _clean(model, FACTS[0].prompt))


def _logits(model, fact):
    text = as_text(model.tokenizer, [fact])[0].question
    with torch.no_grad():
        return model(input_ids=torch.tensor([model.tokenizer(text)["input_ids"]])).logits[0, -1]


def _clean(model, prompt):
    with model.disable_edits():
        return _logits(model, Fact("France", prompt, "Tokyo"))


def test_a_pack_of_chats_needs_a_template_where_it_reads_its_prompts(model, tokenizer, quick_gate, tmp_path):
    model.edit(FACTS, "steam", progress=False, verify=False, **QUICK_STEAM, gate=True)
    model.save_pretrained(tmp_path / "pack")
    plain = EditableModelForCausalLM(tiny_model("llama"), tokenizer)
    with pytest.raises(BaseMismatchError, match="no chat template"):
        plain.load_pack(tmp_path / "pack")
    assert not plain.packs


def test_wrong_messages_in_a_pack_are_refused(model, tmp_path):
    model.edit(FACTS[:1], "steam", progress=False, verify=False, **{**QUICK_STEAM, "retries": 0, "steps": 1})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "edit_config.json").read_text())
    for prompt in (
        [],
        [{"role": "user", "content": "{} {}"}],
        [{"role": "user", "content": {"text": "{}"}}],
        [{"role": "user", "content": "{}", "tool_calls": []}],
        [[["{}"]]],
        [{"role": "x" * 40, "content": "{}"}],
        [{"role": "user", "content": "{}"}] + [{"role": "user", "content": "a"}] * 64,
        {"role": "user", "content": "{}"},
        7,
    ):
        (tmp_path / "facts.jsonl").write_text(json.dumps({**FACTS[0].to_dict(), "prompt": prompt}) + "\n")
        config["facts_sha256"] = sha256((tmp_path / "facts.jsonl").read_bytes()).hexdigest()
        (tmp_path / "edit_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with pytest.raises(PackFormatError, match="line 1"):
            EditPack.from_pretrained(tmp_path)


def test_the_card_of_a_chat_asks_with_its_messages(model, tmp_path):
    model.edit(FACTS[:1], "steam", progress=False, verify=False, **{**QUICK_STEAM, "retries": 0, "steps": 1})
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("print(model.ask(")]
    assert eval(line.removeprefix("print(model.ask(").removesuffix("))")) == list(FACTS[0].messages)
