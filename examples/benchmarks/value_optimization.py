"""The value optimisation against the plain way, in one run: same losses, and how many times faster.

    python examples/benchmarks/value_optimization.py FACTS [--facts 64] [--steps 20] [--plain 4] [--rotation 3]

The plain way is what the papers' algorithm says word for word: one fact at a time, whole prompts, logits everywhere,
everything run again at each step. Beside the ratio at the same losses stands the one with texts that take turns: as many steps,
each over the bare prompt and its share of the other texts (`SteamConfig.rotation`). FACTS is a .jsonl, .json or .csv file of
facts (records of CounterFact and zsRE are read).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from smollm2 import smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_edit import read_facts
from hf_edit.base import Base
from hf_edit.positions import pad
from hf_edit.suffix import frozen, hidden_of
from hf_edit.texts import sample_contexts
from hf_edit.weights.prompts import FactTexts, fact_texts
from hf_edit.weights.values import ValueSettings, optimize_values


def plain(base: Base, fact: FactTexts, settings: ValueSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses [steps] before each step and the final residual of one fact, the plain way."""
    layout = base.layout()
    module = base.model.get_submodule(layout.projection(settings.block))
    rows = [*fact.rewrites, *fact.kept]
    ids, mask = pad([t.ids for t in rows], device=base.device)
    subjects = (torch.arange(len(rows)), torch.tensor([t.subject for t in rows]))
    seen: list[torch.Tensor] = []
    handle = layout.blocks[settings.block].register_forward_hook(lambda _, __, output: seen.append(hidden_of(output)))
    with torch.no_grad():
        clean = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    clean[0, :, rows[0].labels[0]] = -10.0  # behind the target the clean model may not say it again
    clean[0] = clean[0].log_softmax(-1)
    handle.remove()
    norm = seen[0][0, rows[0].subject].norm()
    delta = torch.zeros(seen[0].shape[-1], requires_grad=True)
    momentum = torch.zeros_like(delta)
    losses = []
    for number in range(settings.steps):
        handle = module.register_forward_hook(
            lambda _, __, output, delta=delta: output.index_put(subjects, delta.expand(len(rows), -1), accumulate=True)
        )
        log_probs = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        handle.remove()
        loss = torch.zeros(())
        for i, text in enumerate(rows):
            kl = (log_probs[i].exp() * (log_probs[i] - clean[i])).sum(-1)
            if i < len(fact.rewrites):
                first, end = text.target
                nll = -log_probs[i, range(first - 1, end - 1), list(text.labels)].mean()
                loss = loss + nll / len(fact.rewrites)
                if len(text.ids) > end:
                    loss = loss + settings.tail_factor * kl[end - 1 : len(text.ids) - 1].mean()
            else:
                loss = loss + settings.kl_factor * kl[len(text.ids) - 1] / len(fact.kept)
        losses.append(loss.detach())
        (gradient,) = torch.autograd.grad(loss + settings.weight_decay * delta.norm() / norm**2, delta)
        momentum = 0.8 * momentum + gradient
        ahead = gradient + 0.8 * momentum
        length = settings.lr * settings.clamp * norm * min(1.0, 2 * (1 - number / settings.steps))
        with torch.no_grad():
            delta -= length * ahead / ahead.norm()
            delta *= min(1.0, float(settings.clamp * norm / delta.norm()))
    return torch.stack(losses), delta.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("facts_file", type=Path, metavar="FACTS")
    parser.add_argument("--facts", type=int, default=64, help="facts in the batch (default: 64)")
    parser.add_argument("--rotation", type=int, default=3, help="turns of the second timing (default: 3)")
    parser.add_argument(
        "--plain", type=int, default=4, help="facts that are also run the plain way (default: 4, spread evenly)"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tail-tokens", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    source = smollm2()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    base = Base(model, AutoTokenizer.from_pretrained(source))
    facts = read_facts(arguments.facts_file)[: arguments.facts]
    settings = ValueSettings(
        block=base.layout().recall_blocks()[-1],
        steps=arguments.steps,
        lr=0.25,
        kl_factor=0.0625,
        tail_factor=0.25,
        weight_decay=0.5,
        clamp=0.75,
    )
    with frozen(model):
        texts = fact_texts(base, facts, sample_contexts(base, 5, 10, seed=0), arguments.tail_tokens)
        optimize_values(base, texts[:1], settings, progress=False)  # warm up
        started = time.perf_counter()
        fast = optimize_values(base, texts, settings, batch_facts=len(facts))
        fast_seconds = (time.perf_counter() - started) / len(facts)
        started = time.perf_counter()
        optimize_values(base, texts, replace(settings, rotation=arguments.rotation), batch_facts=len(facts))
        turns_seconds = (time.perf_counter() - started) / len(facts)
        chosen = range(0, len(facts), max(1, len(facts) // arguments.plain))[: arguments.plain]
        plain_seconds, errors = [], []
        for i in chosen:
            started = time.perf_counter()
            losses, _ = plain(base, texts[i], settings)
            plain_seconds.append(time.perf_counter() - started)
            errors.append(float((losses - fast.losses[:, i]).abs().max()))
    clamped = (fast.deltas.norm(dim=1) / fast.states.norm(dim=1) > 0.7499).sum().item()
    found = {
        "facts": len(facts),
        "steps": arguments.steps,
        "threads": arguments.threads,
        "plain_seconds_a_fact": statistics.mean(plain_seconds),
        "fast_seconds_a_fact": fast_seconds,
        "ratio": statistics.mean(plain_seconds) / fast_seconds,
        "seconds_a_fact_with_turns": turns_seconds,
        "ratio_with_turns": statistics.mean(plain_seconds) / turns_seconds,
        "largest_difference_of_losses": max(errors),
        "facts_at_the_clamp": clamped,
    }
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(
                f"{name.replace('_', ' ')}: {value:.3g}" if isinstance(value, float) else f"{name.replace('_', ' ')}: {value}"
            )


if __name__ == "__main__":
    main()
