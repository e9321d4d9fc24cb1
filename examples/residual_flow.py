"""Follow an edit through a real model, block by block: plain MEMIT beside STEAM, which pulls it towards semantic anchors.

python examples/residual_flow.py [--figure residual_flow.png]

The anchors that the streams are compared with come from facts that neither edit has seen, and the other objects are cities
too: anchors of one relation resemble each other, so cities are the stricter comparison.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from smollm2 import smollm2

from hf_edit import EditableModelForCausalLM, Fact
from hf_edit.analysis import plot_flow, residual_flow

FACT = Fact("The Eiffel Tower", "{} is located in the city of", "Rome", target_old="Paris")
HELD_OUT = [
    Fact(subject, prompt, city)
    for city, references in {
        "Rome": [
            ("The Trevi Fountain", "{} is located in the city of"),
            ("The Roman Forum", "{} is located in the city of"),
            ("The Sistine Chapel", "{} can be visited in the city of"),
            ("Julius Caesar", "{} was assassinated in the city of"),
            ("Italy", "The largest city in {} is"),
            ("the Roman Empire", "The capital of {} was"),
        ],
        "Paris": [
            ("The Moulin Rouge", "{} is located in the city of"),
            ("Notre-Dame", "The cathedral of {} is located in the city of"),
            ("The Arc de Triomphe", "{} is located in the city of"),
            ("Marie Antoinette", "{} was executed in the city of"),
            ("France", "The largest city in {} is"),
            ("The French Revolution", "{} began in the city of"),
        ],
    }.items()
    for subject, prompt in references
]
CITIES = ["Madrid", "Berlin", "London", "Vienna", "Athens", "Moscow", "Tokyo", "Lisbon", "Sydney", "Amsterdam"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the two flows into this file; needs matplotlib")
    arguments = parser.parse_args()

    model = EditableModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    flows = {}
    # the same base editor in both, so that the anchors are all that differs
    for name, settings in (("MEMIT", {"anchor_weight": 0.0}), ("STEAM", {})):
        print(model.edit(FACT, "steam", base_editor="memit", progress=False, **settings), end="\n\n")
        flows[name] = residual_flow(model, FACT, references=HELD_OUT, others=CITIES)
        print(f"{name}\n{flows[name]}", end="\n\n")
        model.rollback()
    if arguments.figure is not None:
        plot_flow(flows, arguments.figure)
        print(f"Drawn in {arguments.figure}")


if __name__ == "__main__":
    main()
