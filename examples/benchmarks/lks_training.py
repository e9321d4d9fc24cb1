"""A training step of LKS against the released way, in one run: the same loss, and how many times faster.

    python examples/benchmarks/lks_training.py FACTS [--facts 64] [--batch 32] [--steps 8]

The released way runs the whole model over the texts at each step, edited and once more clean, takes the logits of all
positions, and works out gradients of the base's own weights too, which nothing then uses. *Frozen* leaves those out. LKS runs
the blocks above the edit alone, over the tokens from the mention on, on kept states, keys, values and clean distributions, and
takes the logits where the loss reads them. Building what is kept is a cost of its own, once a text. FACTS is a .jsonl, .json or
.csv file.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from shared import markdown
from smollm2 import smollm2
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import LKSConfig, read_facts
from hf_edit.base import Base, autocast
from hf_edit.methods.lks import training
from hf_edit.methods.lks.editor import blocks_from
from hf_edit.methods.lks.examples import Example, build_examples
from hf_edit.methods.lks.features import read_features
from hf_edit.methods.lks.generator import Generator, make_generator
from hf_edit.positions import pad
from hf_edit.suffix import frozen, hidden_of


def whole_loss(
    base: Base,
    blocks: Sequence[int],
    generator: Generator,
    codes: training.Codes,
    chosen: Sequence[Example],
    config: LKSConfig,
) -> torch.Tensor:
    """The loss of a step by whole runs of the model, edited and clean."""
    ids, mask = pad([e.ids for e in chosen], device=base.device)
    points, known = training.rewritten_points(chosen, generator, codes, base.model.get_input_embeddings())
    rows, columns = torch.tensor(points, device=base.device).unbind(1)

    def rewrite(_: nn.Module, __: object, output: torch.Tensor, write: int) -> torch.Tensor:
        states = hidden_of(output)
        new = generator(known, states[rows, columns].float(), write)
        return states.index_put((rows, columns), new.to(states.dtype))

    with torch.no_grad():
        clean = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    with ExitStack() as stack:
        for write, block in enumerate(blocks):
            hook = functools.partial(rewrite, write=write)
            stack.callback(base.layout().blocks[block].register_forward_hook(hook).remove)
        logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    total = torch.zeros((), device=base.device)
    for r, example in enumerate(chosen):
        if example.labels:
            at, wanted = zip(*example.labels, strict=True)
            weights = logits.new_tensor(training.token_weights(example, generator))
            losses = nn.functional.cross_entropy(logits[r, list(at)], ids.new_tensor(wanted), reduction="none")
            total = total + losses @ weights
        if example.kept:
            top = clean[r, list(example.kept)].topk(training._TOP)
            kl = training._kl(logits[r, list(example.kept)], top.indices, top.values)
            total = total + (config.tail_weight if example.labels else config.kl_weight) * kl.mean()
    return total / len(chosen)


def seconds(loss: Callable[[], torch.Tensor], generator: Generator, steps: int) -> tuple[float, float]:
    """The loss before the first step, and the median of the steps' seconds; the generator goes back to where it was."""
    before = {name: t.clone() for name, t in generator.state_dict().items()}
    optimiser = torch.optim.AdamW(generator.parameters(), lr=1e-3, weight_decay=0.0)
    spent, losses = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        optimiser.zero_grad()
        found = loss()
        found.backward()
        optimiser.step()
        losses.append(float(found.detach()))
        spent.append(time.perf_counter() - started)
    generator.load_state_dict(before)
    return losses[0], statistics.median(spent[1:])  # the first one warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts_file", type=Path, metavar="FACTS")
    parser.add_argument("--facts", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32, help="texts a step (default: 32)")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed, each way (default: 8)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model", help="id or folder (default: SmolLM2-135M-Instruct)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    source = options.model or smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    base, config = Base(model, AutoTokenizer.from_pretrained(source)), LKSConfig()
    block, hidden = base.layout().at_depth(0.55), base.layout().hidden_size
    facts = read_facts(options.facts_file)[: options.facts]
    torch.manual_seed(0)
    blocks = blocks_from(base, block, config.writes)
    generator = make_generator(config.generator, hidden, round(config.width * hidden), config.slots, len(blocks))
    with frozen(model):
        features = read_features(base, block, facts, generator.slots)
        made = build_examples(base, facts, config, seed=0)
        codes = training.Codes(features, generator.code_size).requires_grad_(False)
        flat = [*made.prompts, *(e for group in (*made.variations, *made.locality) for e in group)]
        batch = torch.randperm(len(flat))[: options.batch].tolist()
        chosen = [flat[i] for i in batch]
        ways: dict[str, tuple[float, float]] = {}
        built = 0.0
        for name, dtype in (("LKS", "model"), ("LKS, bfloat16", "auto")):
            started = time.perf_counter()
            with autocast(base.device, dtype):
                cached = training._Cached(base, blocks, flat, batch, config, progress=False)
            built = built or time.perf_counter() - started

            def kept(cached: training._Cached = cached, dtype: str = dtype) -> torch.Tensor:
                with autocast(base.device, dtype):
                    return cached.loss(batch, generator, codes, config)[0]

            ways[name] = seconds(kept, generator, options.steps)

    def whole() -> torch.Tensor:
        return whole_loss(base, blocks, generator, codes, chosen, config)

    with frozen(model):
        ways["frozen"] = seconds(whole, generator, options.steps)
    model.requires_grad_(True)
    ways["released"] = seconds(whole, generator, options.steps)
    slowest = ways["released"][1]
    print(
        markdown(
            [
                {"way": name, "loss": loss, "seconds a step": spent, "times faster": slowest / spent}
                for name, (loss, spent) in ways.items()
            ]
        )
    )
    tokens = sum(len(e.ids) for e in chosen)
    print(f"\n{len(batch)} texts, {tokens} tokens; {1000 * built / len(batch):.1f} ms a text to build what is kept")


if __name__ == "__main__":
    main()
