"""Put one entity's knowledge in another's place and watch the answers follow, block by block; nothing is trained.

    python examples/entity_swap.py [MODEL]

For each question about an entity, the other entity's state is put in at the entity's last token after one block, and the
model is asked again. Printed is, by block, in how many of the questions it gives the answer that it gives when the other
name itself stands in the prompt, and in how many it still gives its old one. Where the first is high, the block holds what
is known of the entity; further up, it has been read already.

It agrees when the answer's first word does, and counts questions whose two answers differ.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from hf_edit import EditableModelForCausalLM
from hf_edit.methods.lks import swap_entity

PAIRS = [
    ("France", "Japan"),
    ("Italy", "Egypt"),
    ("Germany", "Mexico"),
    ("Brazil", "Russia"),
    ("Spain", "India"),
    ("Canada", "Greece"),
]
QUESTIONS = [
    "The capital of {} is the city of",
    "In {}, people speak the language called",
    "The continent on which {} lies is called",
    "The currency that is used in {} is called the",
]


def cases(model: EditableModelForCausalLM) -> Iterator[tuple[str, str, str, str, str]]:
    """(entity, other, question, old answer, answer for the other name) wherever the two answers differ."""
    for one, two in PAIRS:
        for entity, other in ((one, two), (two, one)):
            for question in QUESTIONS:
                old, new = (_word(a) for a in model.ask([question.format(entity), question.format(other)], max_new_tokens=6))
                if old != new:
                    yield entity, other, question, old, new


def _word(answer: str) -> str:
    return (answer.split() or [""])[0].strip(".,;:!?\"'").casefold()


def main() -> None:
    if len(sys.argv) > 1:
        model = EditableModelForCausalLM.from_pretrained(sys.argv[1])
    else:
        from smollm2 import smollm2

        model = EditableModelForCausalLM.from_pretrained(smollm2())
    asked = list(cases(model))
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    print(f"{len(asked)} questions\n\n| block | answers as for the other name, % | as before, % |\n|---|---|---|")
    for layer in range(0, depth - 1, max(1, depth // 10)):
        follows = stays = 0
        for entity, other, question, old, new in asked:
            with swap_entity(model, entity, other, layer=layer, context=question):
                answer = _word(model.ask(question.format(entity), max_new_tokens=6)[0])
            follows += answer == new
            stays += answer == old
        print(f"| {layer} | {100 * follows / len(asked):.0f} | {100 * stays / len(asked):.0f} |", flush=True)


if __name__ == "__main__":
    main()
