"""How many tokens the second moments of MLP keys need, on SmolLM2-135M's own samples.

    python examples/benchmarks/key_statistics.py [--max-tokens 32768] [--output DIR]

For each budget, and on average over the blocks that weight edits change by default:

- distance: |C - C_max|_F / |C_max|_F, relative to the largest budget. Raw it is the distance of the first token's keys, which
  are enormous; "whitened" is |S C S - I|_F / sqrt(d) with S = C_max^-1/2, where every direction counts alike;
- energy: mean of k^T C^-1 k / d over keys of text that no budget has read, with the ridge that edits solve with. It is 1
  where C fits (a little less by the ridge), and above where held-out keys go where C thinks that keys don't go;
- outside: the share of those keys whose energy is above 4.

Sampling is the slow part and is kept in the cache, as the sums are: a second run takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import KeyStatistics
from hf_edit.base import Base
from hf_edit.moments import Moment
from hf_edit.suffix import frozen, read_keys_and_states
from hf_edit.texts import sample_ids

HELD_OUT_SEED = 1_000_003
COLUMNS = ("distance", "whitened", "energy", "outside")


def held_out_keys(base: Base, modules: list[str], rows: int, blocks: range) -> dict[str, torch.Tensor]:
    """Keys [tokens, in] of text sampled with another seed, without the first token, whose key is nearly always the same."""
    with frozen(base.model):
        texts = [row[:64] for row in sample_ids(base, rows, 64, HELD_OUT_SEED)]
        points = [(i, j) for i, row in enumerate(texts) for j in range(1, len(row))]
        keys, _ = read_keys_and_states(base.model, base.layout(), texts, points, modules=modules, last=blocks[-1])
    return {name: found.double().cpu() for name, found in keys.items()}


def fit(moment: Moment, best: Moment, keys: torch.Tensor) -> dict[str, float]:
    """How far C is from the best one, and how it explains held-out keys."""
    C, C_max = moment.matrix, best.matrix
    values, vectors = torch.linalg.eigh(C_max)
    S = vectors / values.clamp(min=1e-12 * float(values[-1])).sqrt()
    energy = (keys.T * moment.solve(keys.T)).sum(0) / len(C)
    return {
        "distance": float((C - C_max).norm() / C_max.norm()),
        "whitened": float((S.T @ C @ S - torch.eye(len(C), dtype=C.dtype)).norm() / len(C) ** 0.5),
        "energy": float(energy.mean()),
        "outside": float((energy > 4).double().mean()),
    }


def measure(model: torch.nn.Module, tokenizer: object, max_tokens: int, held_out_rows: int) -> list[dict[str, float]]:
    """A row a budget."""
    base = Base(model, tokenizer)
    layout = base.layout()
    blocks = layout.recall_blocks()
    modules = [layout.projection(block) for block in blocks]
    keys = held_out_keys(base, modules, held_out_rows, blocks)
    budgets = [max_tokens >> shift for shift in range(5, -1, -1)]
    found, seconds = {}, {}
    for tokens in budgets:
        started = time.perf_counter()
        found[tokens] = KeyStatistics.compute(model, tokenizer, num_tokens=tokens)
        seconds[tokens] = time.perf_counter() - started
    rows = []
    for tokens in budgets:
        best = found[max_tokens].moments
        each = [fit(found[tokens].moments[name], best[name], keys[name]) for name in modules]
        means = {column: sum(e[column] for e in each) / len(each) for column in COLUMNS}
        rows.append({"tokens": tokens, **means, "seconds": seconds[tokens]})
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """The rows as Markdown."""
    lines = ["| tokens | " + " | ".join(COLUMNS) + " | seconds more |", "|" + "---|" * (len(COLUMNS) + 2)]
    for row in rows:
        cells = " | ".join(f"{row[column]:.3g}" for column in COLUMNS)
        lines.append(f"| {row['tokens']:,} | {cells} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-tokens", type=int, default=32768, help="the largest budget; five halvings of it are tried too")
    parser.add_argument("--held-out-rows", type=int, default=64, help="texts of 64 tokens that are held out (default: 64)")
    parser.add_argument("--model", default=None, help="a model id or folder (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="folder for key_statistics.json and key_statistics.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    source = arguments.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = measure(model, tokenizer, arguments.max_tokens, arguments.held_out_rows)
    print(table(rows))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        result = {"model": str(source), "threads": arguments.threads, "budgets": rows}
        (arguments.output / "key_statistics.json").write_text(json.dumps(result, indent=2) + "\n")
        (arguments.output / "key_statistics.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
