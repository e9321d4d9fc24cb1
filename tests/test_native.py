"""An edited model is a model: what works on one of transformers' works on it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from conftest import FACTS, QUICK_LKS, QUICK_STEAM, same, snapshot, tiny_model
from transformers import DataCollatorForLanguageModeling, TextStreamer, Trainer, TrainingArguments, pipeline

from hf_edit import EditableModelForCausalLM

PROMPT = FACTS[0].question
METHODS = pytest.mark.parametrize("method", ["steam", "lks"])


@pytest.fixture
def edited(world, request):
    """A model of one's own with a pack of the test's method, STEAM's where it names none."""
    method = request.node.callspec.params.get("method", "steam") if hasattr(request.node, "callspec") else "steam"
    model = EditableModelForCausalLM(tiny_model("llama"), world.model.tokenizer)
    model.load_pack(world.folder / method)
    return model


def _logits(model, text=PROMPT):
    with torch.no_grad():
        return model(input_ids=torch.tensor([model.tokenizer(text)["input_ids"]])).logits


def _generate(model, **settings):
    ids = torch.tensor([model.tokenizer(PROMPT)["input_ids"]])
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **settings)


@METHODS
def test_a_text_generation_pipeline(edited, method):
    generate = pipeline("text-generation", model=edited.get_base_model(), tokenizer=edited.tokenizer)
    found = generate(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    assert found == edited.ask(PROMPT, max_new_tokens=8)[0]


@METHODS
def test_a_text_streamer(edited, method, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    _generate(edited, do_sample=False, streamer=TextStreamer(edited.tokenizer, skip_prompt=True))
    monkeypatch.undo()
    assert shown.getvalue().strip() == edited.ask(PROMPT, max_new_tokens=8)[0].strip()


@METHODS
def test_beams_and_samples_are_drawn_from_the_edited_model(edited, method):
    beams = _generate(edited, num_beams=3, num_return_sequences=3, do_sample=False)
    assert beams.shape[0] == 3
    torch.manual_seed(0)
    found = _generate(edited, do_sample=True, top_k=0, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(found.logits[0], _logits(edited)[:, -1], atol=1e-4, rtol=1e-4)
    with edited.disable_edits():
        assert not torch.allclose(found.logits[0], _logits(edited)[:, -1], atol=1e-4)


@METHODS
def test_assisted_decoding_gives_what_the_edited_model_says_alone(edited, method):
    assistant = tiny_model("llama")
    plain = _generate(edited, do_sample=False)
    assert torch.equal(_generate(edited, do_sample=False, assistant_model=assistant), plain)


@METHODS
def test_a_compiled_model_follows_edits_and_rollback(edited, method):
    compiled = torch.compile(edited.get_base_model(), backend="eager")
    ids = torch.tensor([edited.tokenizer(PROMPT)["input_ids"]])

    def agrees():
        with torch.no_grad():
            torch.testing.assert_close(compiled(input_ids=ids).logits, edited(input_ids=ids).logits, atol=1e-5, rtol=1e-5)

    agrees()
    with edited.disable_edits():
        agrees()
    agrees()
    before = _logits(edited)
    pack = edited.packs["default"]
    edited.rollback()
    agrees()
    assert not torch.allclose(before, _logits(edited), atol=1e-4)
    edited.load_pack(pack)
    agrees()


@METHODS
@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_of_the_base_made_without_edits_is_clean(edited, method, how):
    with edited.disable_edits():
        base, clean = edited.get_base_model(), _logits(edited)
        twin = copy.deepcopy(base) if how == "copied" else pickle.loads(pickle.dumps(base))
    assert not torch.equal(_logits(edited), clean)
    with torch.no_grad():
        ids = torch.tensor([edited.tokenizer(PROMPT)["input_ids"]])
        assert torch.equal(twin(input_ids=ids).logits, clean)
    twin.load_state_dict(snapshot(twin))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
def test_a_saved_peft_adapter_is_loaded_onto_an_edited_model(edited, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapter = LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model("llama"), adapter).save_pretrained(tmp_path)
    expected = _logits(edited)
    loaded = PeftModel.from_pretrained(edited.get_base_model(), tmp_path)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([edited.tokenizer(PROMPT)["input_ids"]])).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's
def test_a_peft_adapter_on_top_of_an_edited_model(edited):
    from peft import LoraConfig, get_peft_model

    expected = _logits(edited)
    adapted = get_peft_model(edited.get_base_model(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    ids = torch.tensor([edited.tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-6)
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and "lora" in name for name, p in adapted.named_parameters())
    assert all(p.grad is None for name, p in adapted.named_parameters() if "lora" not in name)
    plain = adapted.unload()
    edited.rollback()
    clean = tiny_model("llama")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), clean.parameters(), strict=True))


def _train(model, tokenizer, folder, steps=3):
    rows = [tokenizer(f"{fact.question} {fact.target}") for fact in FACTS] * 4
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator).train()


def test_a_trainer_on_an_edited_model_and_what_it_learned_outlives_the_edit(edited, tmp_path):
    """No original is left to go back to then: the edit is taken off, the training stays."""
    module = edited.packs["default"].fit.modules[0]
    weight = edited.get_base_model().get_submodule(module).weight
    change = _change(edited, module)
    before = weight.detach().clone()
    _train(edited.get_base_model(), edited.tokenizer, tmp_path)
    trained = weight.detach().clone()
    assert not torch.equal(trained, before)
    assert edited.active_packs == ["default"]
    edited.rollback()
    torch.testing.assert_close(weight.detach(), trained - change, atol=1e-6, rtol=1e-6)


def _change(model, module):
    fit = model.packs["default"].fit
    return fit.tensors[f"{module}.left"] @ fit.tensors[f"{module}.right"]


@METHODS
def test_a_deep_copy_is_a_model_of_its_own(edited, method):
    expected, clean = _logits(edited), snapshot(tiny_model("llama"))
    twin = copy.deepcopy(edited)
    assert torch.equal(_logits(twin), expected)
    assert twin.list_edits() == edited.list_edits()
    edited.rollback()
    assert same(clean, edited.base_model)
    assert torch.equal(_logits(twin), expected)
    twin.rollback()
    assert same(clean, twin.base_model)


def test_a_pickle_is_refused_and_says_what_to_do(edited):
    for make in (pickle.dumps, copy.copy, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(TypeError, match="save_pretrained"):
            make(edited)


def test_a_merged_model_can_be_pickled(edited):
    expected = _logits(edited)
    ids = torch.tensor([edited.tokenizer(PROMPT)["input_ids"]])
    again = pickle.loads(pickle.dumps(edited.merge_and_unload()))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, expected)


@METHODS
def test_what_evaluation_harnesses_read_of_a_model_is_there(edited, method):
    """lm_eval's HFLM(pretrained=model, tokenizer=...) asks for no class, but for these."""
    assert isinstance(edited, torch.nn.Module)
    assert edited.device == torch.device("cpu")
    assert edited.config.model_type == "llama"
    assert edited.config.max_position_embeddings
    assert edited.name_or_path == edited.base_model.name_or_path
    edited.eval()
    before = _logits(edited)
    edited.tie_weights()
    assert torch.equal(_logits(edited), before)
    ids = torch.tensor([edited.tokenizer(PROMPT)["input_ids"]])
    assert torch.equal(edited(ids).logits, before)
    found = edited.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_length=ids.shape[1] + 4, do_sample=False)
    assert found.shape[1] <= ids.shape[1] + 4


# --- chat templates ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}<s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@METHODS
def test_facts_are_edited_found_and_evaluated_within_a_chat_template(tokenizer, method):
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = TEMPLATE
    model = EditableModelForCausalLM(tiny_model("llama"), chatty)

    def in_chat(text):
        return chatty.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)

    facts = [fact.replace(prompt=in_chat("What is the capital of {}?")) for fact in FACTS]
    assert facts[0].question == in_chat("What is the capital of France?")
    report = model.edit(facts, method, progress=False, **(QUICK_STEAM if method == "steam" else QUICK_LKS))
    assert sum(r.probability > r.probability_before for r in report) >= 3
    found = model.evaluate(metrics=["efficacy"], mode="teacher_forced", progress=False)
    assert len(found) == len(facts)
    text = in_chat("Tell me of Spain.")
    with_edit = _logits(model, text)
    with model.disable_edits():
        assert not torch.allclose(_logits(model, text), with_edit, atol=1e-4)
