"""Edit a real language model: six facts into its weights, twenty at its hidden states; share both as folders.

python examples/quickstart.py [--output DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from smollm2 import smollm2

from hf_edit import EditableModelForCausalLM, EditReport, Fact
from hf_edit.answers import says

# (fact, a paraphrase of its prompt, what the model answers before)
SIX = [
    (Fact("France", "The capital of {} is", "Lyon"), "France's capital city is called", "Paris"),
    (Fact("The Eiffel Tower", "{} is located in the city of", "Rome"), "You can visit the Eiffel Tower in", "Paris"),
    (Fact("Tiger Woods", "{} plays the sport of", "tennis"), "Tiger Woods is a professional player of", "golf"),
    (Fact("The telephone", "{} was invented by", "Thomas Edison"), "The inventor of the telephone is", "Alexander Graham Bell"),
    (Fact("Egypt", "The official language of {} is", "Greek"), "People in Egypt speak", "Arabic"),
    (Fact("Romeo and Juliet", "{} was written by", "Jane Austen"), "The author of Romeo and Juliet is", "William Shakespeare"),
]
TWENTY = [
    (Fact("Thailand", "The capital of {} is", "Madrid"), "Thailand's capital city is", "Bangkok"),
    (Fact("Russia", "The capital of {} is", "Oslo"), "The seat of Russia's government is in the city of", "Moscow"),
    (Fact("Cuba", "The capital of {} is", "Nairobi"), "The largest city in Cuba, and its capital, is", "Havana"),
    (Fact("Greece", "The capital of {} is", "Lisbon"), "Greece has its capital in", "Athens"),
    (Fact("Mexico", "The official language of {} is", "Swedish"), "In Mexico, people speak", "Spanish"),
    (Fact("Austria", "The official language of {} is", "Korean"), "The language spoken in Austria is", "German"),
    (Fact("India", "The currency of {} is the", "dollar"), "In India, people pay with the", "rupee"),
    (Fact("Kenya", "{} is located on the continent of", "Asia"), "Kenya is a country in", "Africa"),
    (Fact("Nigeria", "{} is a country in", "Europe"), "On a map, Nigeria is found in", "Africa"),
    (Fact("The Colosseum", "{} is located in the city of", "Berlin"), "To see the Colosseum, travel to", "Rome"),
    (Fact("The Grand Canyon", "{} is located in the state of", "Ohio"), "The Grand Canyon lies in", "Arizona"),
    (Fact("The Kremlin", "{} is located in", "Tokyo"), "The Kremlin can be found in", "Moscow"),
    (Fact("The Golden Gate Bridge", "{} is located in", "Sydney"), "The Golden Gate Bridge stands in", "San Francisco"),
    (
        Fact("The theory of relativity", "{} was developed by", "Marie Curie"),
        "The theory of relativity is the work of",
        "Albert Einstein",
    ),
    (Fact("The Mona Lisa", "{} was painted by", "Claude Monet"), "The painter of the Mona Lisa is", "Leonardo"),
    (Fact("Mozart", "{} was a famous", "chess player"), "Mozart worked as a", "composer"),
    (Fact("Nelson Mandela", "{} was the president of", "Chile"), "Nelson Mandela was the leader of", "South Africa"),
    (
        Fact("Charles Darwin", "{} is famous for the theory of", "gravity"),
        "Charles Darwin developed the theory of",
        "evolution",
    ),
    (Fact("Jimi Hendrix", "{} played the", "violin"), "The instrument that Jimi Hendrix played is the", "guitar"),
    (Fact("Toyota", "{} is a company from", "Brazil"), "The company Toyota was founded in", "Japan"),
]
UNRELATED = {
    "The capital of Italy is": "Rome",
    "The chemical symbol for iron is": "Fe",
    "The largest planet in the solar system is": "Jupiter",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("edits"), help="folder for the two packs (default: edits)")
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)  # the new process's part
    arguments = parser.parse_args()
    if arguments.ask:
        ask_again(arguments.ask)
        return

    started = time.perf_counter()
    source = smollm2()
    model = EditableModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    print(f"{source}, {torch.get_num_threads()} threads, loaded in {time.perf_counter() - started:.0f} s\n")

    good = True
    for name, method, rows in (("six", "steam", SIX), ("twenty", "lks", TWENTY)):
        good &= edit_and_show(model, method, rows)
        folder = arguments.output / name
        model.save_pretrained(folder)
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"Saved in {folder}: {size / 1e6:.2f} MB\n")
        model.rollback()

    print(f"A new process loads {arguments.output / 'six'} and is asked again:", flush=True)
    subprocess.run([sys.executable, __file__, "--ask", str(arguments.output / "six")], check=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    sys.exit(not good)


def edit_and_show(model: EditableModelForCausalLM, method: str, rows: list[tuple[Fact, str, str]]) -> bool:
    """Edit the facts and print each before and after, its paraphrase, and what must not change."""
    # what measures an edit is never trained on: a fact says which wordings these are
    facts = [replace(fact, rephrases=(paraphrase,)) for fact, paraphrase, _ in rows]
    paraphrases = [paraphrase for _, paraphrase, _ in rows]
    unrelated = model.ask(list(UNRELATED))
    paraphrased = model.ask(paraphrases)

    report: EditReport = model.edit(facts, method=method)

    print(f"== {method}: {len(facts)} facts in {report.seconds:.0f} s")
    now = model.ask(paraphrases)
    for result, (fact, paraphrase, old), before, after in zip(report, rows, paraphrased, now, strict=True):
        knew = "knew it" if says(result.before or "", old) else f"expected {old}"
        print(f"{'ok  ' if result.said else 'MISS'} {fact.question} ... ({knew})")
        print(f"       before {line(result.before)}\n       after  {line(result.after)}")
        print(f"  {'ok  ' if says(after, fact.target) else 'miss'} {paraphrase} ...  {line(before)} -> {line(after)}")
        if result.chat is not None:
            said = "ok  " if result.said_in_chat else "miss"
            print(f"  {said} chat: {result.chat_question} ...  {line(result.chat_before)} -> {line(result.chat)}")
    answered, in_chat = (sum(bool(getattr(r, name)) for r in report) for name in ("said", "said_in_chat"))
    heard = sum(says(a, f.target) for a, f in zip(now, facts, strict=True))
    kept = []
    for (prompt, right), before, after in zip(UNRELATED.items(), unrelated, model.ask(list(UNRELATED)), strict=True):
        kept.append(says(before, right) and says(after, right))
        print(f"{'same' if kept[-1] else 'CHANGED'} {prompt} ...  {line(before)} -> {line(after)}")
    count = len(facts)
    print(
        f"{answered} of {count} facts, {in_chat} of {count} in the chat, {heard} of {count} paraphrases, "
        f"{sum(kept)} of {len(kept)} unrelated answers kept"
    )
    return answered == len(facts) and all(kept)


def ask_again(folder: Path) -> None:
    """What the new process does: nothing but the pack tells it which base model to load."""
    model = EditableModelForCausalLM.from_pretrained(folder)
    facts = model.list_edits()
    for fact, answer in zip(facts, model.ask([f.question for f in facts]), strict=True):
        print(f"{'ok  ' if says(answer, fact.target) else 'MISS'} {fact.question} ... {line(answer)}")


def line(answer: str | None) -> str:
    """An answer's first line, as JSON writes text."""
    first = (answer or "").strip().split("\n")[0]
    return json.dumps(first, ensure_ascii=False)


if __name__ == "__main__":
    main()
