"""LKS as a method: features, training, and a pack of a generator and a feature a fact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from ...base import Base, seeded
from ...errors import PackFormatError
from ...facts import Fact
from ...positions import EncodedText, Text, encode, fact_text, join
from ...references import bank
from ...suffix import frozen, read_keys_and_states
from .. import Fit, register_method
from .attach import LKSAttachment
from .config import LKSConfig
from .examples import Example, Examples, build_examples
from .generator import Generator
from .routing import fit_routing, gate_names, kept_routing, load_routing, validate_routing
from .scope import Scope
from .training import train

__all__ = ["LKS"]

_PREFIX = "generator."
_GENERAL_TEXTS = 128
_DEPTH = 0.55


class LKS:
    """Latent Knowledge Scalpel: see `hf_edit.methods.lks`."""

    name = "lks"
    config_class = LKSConfig
    in_weights = False

    def fit(
        self,
        base: Base,
        facts: Sequence[Fact],
        config: LKSConfig,
        *,
        previous: Fit | None,
        clean: Callable[[], AbstractContextManager[None]],
        seed: int,
        progress: bool,
    ) -> Fit:
        """See `hf_edit.methods.Method.fit`. Facts that join a pack are trained together with its own, from its generator."""
        if (short := _single_letter(facts)) is not None:
            raise ValueError(f"LKS can't look for {short!r}: a single letter would be found everywhere; use method='steam'")
        everything = (*(previous.facts if previous else ()), *facts)
        entities = _Entities.of(everything)
        block = _block(base, config)
        with frozen(base.model):
            features = read_features(base, block, everything)
            generator = self._generator(base, block, config, previous, seed)
            examples = entities.by_fact(build_examples(base, everything, entities.scope, config, seed))
            with seeded(seed, base.device):
                train(base, block, generator, features.to(base.device), examples, config, seed, progress)
            gate = fit_routing(base, block, everything, _own(previous), clean, seed, progress) if config.gate else {}
        tensors = {_PREFIX + name: t.detach().float().cpu().clone() for name, t in generator.state_dict().items()}
        tensors |= {"features": features.cpu(), **gate}
        return Fit(tensors, (f"{base.layout().blocks_path}.{block}",), everything)

    def _generator(self, base: Base, block: int, config: LKSConfig, previous: Fit | None, seed: int) -> Generator:
        hidden = base.layout().hidden_size
        with seeded(seed, base.device):
            generator = Generator(hidden, round(config.width * hidden))
        if previous is not None:
            generator = _loaded(previous)
        else:
            generator.standardise(*_general_states(base, block))
        return generator.to(base.device)

    def remove(self, fit: Fit, keep: Sequence[int]) -> Fit:
        """The same edit with only the facts `keep`: the others leave the scope and the gate, the generator stays."""
        tensors = {**fit.tensors, "features": fit.tensors["features"][list(keep)].clone(), **kept_routing(fit.tensors, keep)}
        return Fit(tensors, fit.modules, tuple(fit.facts[i] for i in keep))

    def validate(self, fit: Fit, config: LKSConfig, base: Base | None) -> None:
        """See `hf_edit.methods.Method.validate`."""
        features = fit.tensors.get("features")
        if features is None or features.dim() != 2 or features.dtype != torch.float32 or len(features) != len(fit.facts):
            raise PackFormatError(
                f"the pack needs a float32 matrix 'features' with a row for each of its {len(fit.facts)} facts"
            )
        hidden = features.shape[1]
        with torch.device("meta"):
            expected = Generator(hidden, round(config.width * hidden)).state_dict()
        shapes = {_PREFIX + name: tuple(t.shape) for name, t in expected.items()} | {"features": tuple(features.shape)}
        validate_routing(fit.tensors, len(fit.facts), hidden)
        of_gate = gate_names(fit.tensors)
        found = {name: tuple(t.shape) for name, t in fit.tensors.items() if name not in of_gate}
        if found != shapes or any(t.dtype != torch.float32 for t in fit.tensors.values()):
            wrong = sorted(n for n in {*found, *shapes} if found.get(n) != shapes.get(n))
            raise PackFormatError(f"the pack's tensors are not those of an LKS generator: {', '.join(wrong)[:300] or 'dtype'}")
        if (short := _single_letter(fit.facts)) is not None:
            raise PackFormatError(f"the name {short!r} is a single letter and would be found everywhere")
        if base is not None:
            layout = base.layout()
            if fit.modules != (f"{layout.blocks_path}.{_block(base, config)}",) or hidden != layout.hidden_size:
                raise PackFormatError(f"the pack edits {fit.modules}, this model has no such block of {hidden} dimensions")

    def attach(self, base: Base, fit: Fit, config: LKSConfig) -> LKSAttachment:
        """See `hf_edit.methods.Method.attach`."""
        entities = _Entities.of(fit.facts, config.fuzzy)
        generator = _loaded(fit).to(base.device).requires_grad_(False)
        with torch.no_grad():
            codes = generator.encode(fit.tensors["features"].to(base.device))
        block = _block(base, config)
        routing = load_routing(base, block, fit.tensors)
        return LKSAttachment(base, block, entities.scope, entities.facts(), generator, codes, routing)


def _single_letter(facts: Sequence[Fact]) -> str | None:
    return next((n for f in facts for n in (f.subject, *f.aliases) if len(n) == 1 and n.isascii()), None)


@dataclass(frozen=True)
class _Entities:
    """The entities that facts are about: one for each subject, whatever its case."""

    scope: Scope
    of_fact: tuple[int, ...]

    @classmethod
    def of(cls, facts: Sequence[Fact], fuzzy: bool = False) -> _Entities:
        names: dict[str, list[str]] = {}
        for fact in facts:
            own = names.setdefault(fact.subject.casefold(), [])
            own += [n for n in (fact.subject, *fact.aliases) if n not in own]
        keys = {key: i for i, key in enumerate(names)}
        return cls(Scope(list(names.values()), fuzzy), tuple(keys[f.subject.casefold()] for f in facts))

    def facts(self) -> list[list[int]]:
        """For each entity, the numbers of its facts, the newest last."""
        found: list[list[int]] = [[] for _ in range(1 + max(self.of_fact))]
        for fact, entity in enumerate(self.of_fact):
            found[entity].append(fact)
        return found

    def by_fact(self, examples: Examples) -> Examples:
        """Training texts whose mentions, of the fact's own subject only, name the fact in the entity's place."""

        def own(example: Example, fact: int) -> list[Example]:
            at = tuple((p, fact) for p, entity in example.mentions if entity == self.of_fact[fact])
            return [replace(example, mentions=at)] if at else []

        groups = [
            [[e for example in group for e in own(example, fact)] for fact, group in enumerate(kind)]
            for kind in (examples.variations, examples.locality)
        ]
        prompts = [e for fact, example in enumerate(examples.prompts) for e in own(example, fact)]
        return Examples(prompts, *groups)


def _own(previous: Fit | None) -> Mapping[str, torch.Tensor]:
    """The tensors of a pack that facts join, where its facts are still those that the tensors are for."""
    whole = previous is not None and len(previous.facts) == len(previous.tensors["features"])
    return previous.tensors if previous is not None and whole else {}


def read_features(base: Base, block: int, facts: Sequence[Fact]) -> torch.Tensor:
    """Each fact's feature: the block's output at the last token of prompt and target, float32 [facts, hidden].

    (Latent Knowledge Scalpel, arXiv 2508.03741: the state of the "prompt target" text.)
    """
    texts = encode(base.tokenizer, [fact_text(f, target=f.target) for f in facts])
    return _last_states(base, block, texts, [len(t.ids) - 1 for t in texts])


def _general_states(base: Base, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and subject states of facts of all kinds, to standardise with: no fact needs others beside it."""
    references = [group[0] for group in bank().values()]
    references = references[:: max(1, len(references) // _GENERAL_TEXTS)][:_GENERAL_TEXTS]
    texts = []
    for r in references:
        before, _, after = r.prompts[0].partition("{}")
        prompt = before + r.subject + after
        texts.append(Text(join(prompt, r.object), (len(before), len(before) + len(r.subject))))
    encoded = encode(base.tokenizer, texts)
    features = _last_states(base, block, encoded, [len(t.ids) - 1 for t in encoded])
    return features, _last_states(base, block, encoded, [t.subject for t in encoded])


def _last_states(base: Base, block: int, texts: Sequence[EncodedText], positions: Sequence[int]) -> torch.Tensor:
    points = list(enumerate(positions))
    _, states = read_keys_and_states(base.model, base.layout(), [t.ids for t in texts], points, blocks=(block,), last=block)
    return states[block].float()


def _loaded(fit: Fit) -> Generator:
    state = {name.removeprefix(_PREFIX): t for name, t in fit.tensors.items() if name.startswith(_PREFIX)}
    width, hidden = state["feature_in.weight"].shape
    generator = Generator(hidden, width)
    generator.load_state_dict(state)
    return generator


def _block(base: Base, config: LKSConfig) -> int:
    layout = base.layout()
    block = layout.at_depth(_DEPTH) if config.layer is None else layout.block(config.layer)
    if block == len(layout) - 1:
        raise ValueError(f"layer {block} is the last block, nothing runs above it; choose one from 0 to {len(layout) - 2}")
    return block


register_method(LKS())
