"""CPU seconds and peak memory of loading a pack, against the base model alone.

    python examples/benchmarks/loading.py [MODEL] [--steam 100] [--lks 10000]

Each measurement is a process of its own. The packs hold random numbers of the right shapes: what is timed is reading, checking,
and putting them on, whatever the numbers are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import EditableModelForCausalLM, EditPack, Fact
from hf_edit.base import Base
from hf_edit.methods import Fit, get_method
from hf_edit.methods.steam.record import Record
from hf_edit.pack import describe_base, versions

# Imports come first: they are the same for all, and no part of loading.
_MEASURED = """
import resource, sys, time
import ahocorasick, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from hf_edit import EditableModelForCausalLM
import hf_edit.methods.lks, hf_edit.methods.steam

what, base = sys.argv[1:3]
started = time.process_time()
model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
sum(float(p.detach().flatten()[:1]) for p in model.parameters())
alone = time.process_time() - started
model = EditableModelForCausalLM(model, tokenizer)
started = time.process_time()
if what != "alone":
    model.load_pack(what)
on_top = time.process_time() - started
model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=1)
print(alone, on_top, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def facts(count: int) -> list[Fact]:
    """Facts on subjects of their own."""
    return [Fact(f"Person Number {n}", "{} was born in the city of", f"Town {n % 97}") for n in range(count)]


def random_steam(base: Base, count: int) -> Fit:
    """A weight edit of random factors in the layers that MEMIT would edit."""
    layout = base.layout()
    tensors = {}
    for block in layout.recall_blocks():
        name = layout.projection(block)
        out, width = base.model.get_submodule(name).weight.shape
        tensors |= {
            f"{name}.left": torch.randn(out, count),
            f"{name}.right": 1e-6 * torch.randn(count, width),
            f"{name}.gram": torch.eye(count),
        }
    modules = tuple(sorted({name.rpartition(".")[0] for name in tensors}))
    record = Record.of(torch.randn(count, 1, layout.hidden_size), 0, "memit")
    return Fit(tensors | record.tensors(), modules, tuple(facts(count)))


def random_lks(model: EditableModelForCausalLM, count: int) -> EditPack:
    """An LKS edit of one fact, trained for a step, whose code and key are then repeated for many."""
    model.edit(facts(1), "lks", epochs=1, min_steps=1, contexts=0, locality_prompts=0, tail_tokens=0, verify=False)
    pack = model.packs["default"]
    model.rollback()
    own = {name: pack.tensors[name] for name in ("codes", "gate.keys")}
    tensors = pack.tensors | {name: t.expand(count, -1).contiguous() for name, t in own.items()}
    return EditPack("lks", pack.config, Fit(tensors, pack.fit.modules, tuple(facts(count))), pack.base, 0, pack.versions)


def make_packs(name: str, folder: Path, counts: dict[str, int]) -> None:
    """Write a pack a method."""
    model = EditableModelForCausalLM(AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name))
    base = Base(model.base_model, model.tokenizer)
    fit = random_steam(base, counts["steam"])
    config = get_method("steam").config_class()
    EditPack("steam", config, fit, describe_base(base, fit.modules), 0, versions()).save_pretrained(folder / "steam")
    random_lks(model, counts["lks"]).save_pretrained(folder / "lks")


def measure(what: str, name: str) -> tuple[float, float, float]:
    """CPU seconds of the base and of the pack, and the process's peak in MB."""
    done = subprocess.run([sys.executable, "-c", _MEASURED, what, name], capture_output=True, text=True, check=True)
    alone, on_top, peak = map(float, done.stdout.split())
    return alone, on_top, peak


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--steam", type=int, default=100, help="facts of the STEAM pack")
    parser.add_argument("--lks", type=int, default=10_000, help="facts of the LKS pack")
    options = parser.parse_args()
    counts = {"steam": options.steam, "lks": options.lks}
    with tempfile.TemporaryDirectory() as folder:
        # elsewhere: a process's peak counts that of the process which started it
        maker = get_context("spawn").Process(target=make_packs, args=(options.model, Path(folder), counts))
        maker.start()
        maker.join()
        base, _, least = measure("alone", options.model)
        print("| loaded | file MB | CPU seconds | peak MB | peak over the base's |\n|---|---|---|---|---|")
        print(f"| the base alone | | {base:.2f} | {least:.0f} | |")
        for method, count in counts.items():
            size = (Path(folder) / method / "edits.safetensors").stat().st_size / 2**20
            _, seconds, peak = measure(str(Path(folder) / method), options.model)
            print(f"| {method}, {count} facts, on top | {size:.1f} | {seconds:.2f} | {peak:.0f} | {peak - least:+.0f} |")


if __name__ == "__main__":
    main()
