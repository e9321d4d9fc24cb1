from __future__ import annotations

import pytest
import torch
from conftest import FACTS

from hf_edit.alignment import general_references, reference_cosines, reference_states, score_references
from hf_edit.references import Reference, bank_relations

TOKYO = [Reference("capital", "Japan", ("The capital of {} is",), "Tokyo")]
TOKYO.append(Reference("continent", "Yes", ("{}. The capital of",), "Tokyo"))
OTHERS = [
    Reference("capital", "Italy", ("The capital of {} is",), "Rome"),
    Reference("official_language", "Spain", ("The official language of {} is",), "Spanish"),
]


def _state(model, prompt, block):
    with torch.no_grad():
        out = model(input_ids=torch.tensor([model.tokenizer(prompt)["input_ids"]]), output_hidden_states=True)
    return out.hidden_states[block + 1][0, -1]


def test_cosines_to_references_are_what_a_hand_computation_gives(llama):
    states = reference_states(llama, [TOKYO, []], general=OTHERS, blocks=[2, 4])
    found = reference_cosines(llama, FACTS[:2], states)
    assert found.blocks == (2, 4)
    for column, block in enumerate(found.blocks):
        here = _state(llama, FACTS[0].question, block)
        mean = sum(_state(llama, r.prompts[0].replace("{}", r.subject), block) for r in TOKYO) / 2
        centre = sum(_state(llama, r.prompts[0].replace("{}", r.subject), block) for r in OTHERS) / 2
        assert float(found.raw[0, column]) == pytest.approx(float(torch.cosine_similarity(here, mean, dim=0)), abs=1e-4)
        centred = torch.cosine_similarity(here - centre, mean - centre, dim=0)
        assert float(found.centred[0, column]) == pytest.approx(float(centred), abs=1e-4)


def test_a_fact_without_references_has_no_cosine(llama):
    states = reference_states(llama, [[], TOKYO], general=OTHERS, blocks=[2])
    found = reference_cosines(llama, FACTS[:2], states)
    assert bool(found.centred[0].isnan().all())
    assert bool(found.raw[0].isnan().all())
    assert bool(found.centred[1].isfinite().all())
    with pytest.raises(ValueError, match="go together one by one"):
        reference_cosines(llama, FACTS[:1], states)


def test_a_reference_is_recalled_by_its_own_object(llama):
    # some prompt that the random model goes on from with a whole word
    prompts = [f"The capital of {subject} is" for subject, _ in bank_relations()[0].facts[:48]]
    prompt, said = next(
        (p, a) for p, a in zip(prompts, llama.ask(prompts, max_new_tokens=1), strict=True) if a[:1] == " " and a[1:].isalpha()
    )
    subject = prompt[len("The capital of ") : -len(" is")]
    objects = [said.strip(), "Rome" if said.strip() != "Rome" else "Tokyo"]
    right, wrong = score_references(llama, [Reference("capital", subject, ("The capital of {} is",), o) for o in objects])
    assert right.right
    assert right.rank == 0
    assert not wrong.right
    assert wrong.rank > 0


def test_the_general_set_leaves_out_the_objects_at_hand():
    barred = {r.object for r in general_references()[:10]}
    assert len(barred) == 10
    assert not barred & {r.object for r in general_references(barred)}
