"""LKS as a method: features, training, and a pack of a generator and a code a fact."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch

from ...base import Base, seeded
from ...errors import PackFormatError
from ...facts import Fact, visible
from ...positions import joined_without_space
from ...routing import fit_routing, gate_names, kept_routing, load_routing, validate_routing
from ...scope import Entities
from ...suffix import frozen
from .. import Fit, register_method
from ..scope.attachment import MentionAttachment
from ..scope.tracker import Spellings
from .attach import Rewriting
from .config import LKSConfig
from .editor import block_of, blocks_from, checkpoint_path, open_editor
from .examples import build_examples
from .features import longest_target, read_features
from .generator import Generator, generator_of, packed
from .training import Trained, train

__all__ = ["LKS"]

_PREFIX = "generator."
_CODES = "codes"
_FEW = 64  # facts; so few are fitted by their codes alone, on a generator that was trained beforehand
_LANDED = 0.5  # nats a token of a fact's target; codes that leave more are not enough
_REHEARSED = 512  # facts of a pack that its generator goes on with when it has to learn others


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
        """See `hf_edit.methods.Method.fit`.

        Facts that join a pack get codes for its generator, and the pack's own stay as they are, bit for bit. Where codes can't
        tell a generator that learnt few facts what it is to say, it learns on, the pack's own facts beside the new ones.
        """
        if (short := _single_letter(facts)) is not None:
            raise ValueError(f"LKS can't look for {short!r}: a single letter would be found everywhere; use method='steam'")
        if not config.train and (config.released or config.editor == "none"):
            raise ValueError(
                "train=False edits by a generator that was trained beforehand; give one: editor='bank' or a folder"
            )
        if previous is None:
            editor = open_editor(base, _fitted(base, facts, config), seed, progress)
            block, trained = editor.layer, editor.num_facts > 0
            start, learned = editor.generator, editor.gate
        else:
            block, trained = _block_of(previous.modules[0]), True
            start, learned = _loaded(config, previous), None
        generator = generator_of(config.generator, start.state_dict()).to(base.device)
        blocks = blocks_from(base, block, generator.writes)
        with frozen(base.model):
            known = previous.tensors if previous else {}
            before = known.get(_CODES, torch.empty(0, generator.code_size, dtype=generator.code_dtype))
            codes_only = trained and not config.released and (previous is not None or len(facts) <= _FEW)
            study = _Study(base, blocks, config, seed, progress)
            if not config.train or (codes_only and config.code_lr == 0):
                codes = generator.encode(study.features(generator, facts))
            else:
                done = study.train(generator, facts, codes_only=codes_only)
                codes = done.codes
                if codes_only and bool((done.nll > _LANDED).any()):
                    before, codes = study.go_on(generator, previous.facts if previous else (), before, facts, codes)
            everything = (*(previous.facts if previous else ()), *facts)
            gate: dict[str, torch.Tensor] = {}
            if config.gate:
                telling: Sequence[Fact] = facts if config.train_on_rephrases else ()
                gate = fit_routing(base, everything, known, clean, seed, progress, config.gate_quiet, block, learned, telling)
        codes = codes.detach().to(generator.code_dtype).cpu()
        tensors = {_PREFIX + name: t for name, t in packed(generator).items()} | gate
        tensors[_CODES] = torch.cat([before, codes])
        return Fit(tensors, _modules(base, blocks), everything)

    def remove(self, fit: Fit, keep: Sequence[int]) -> Fit:
        """The same edit with only the facts `keep`: the others leave the scope and the gate, the generator and all other codes
        stay."""
        tensors = {**fit.tensors, _CODES: fit.tensors[_CODES][list(keep)].clone(), **kept_routing(fit.tensors, keep)}
        return Fit(tensors, fit.modules, tuple(fit.facts[i] for i in keep))

    def validate(self, fit: Fit, config: LKSConfig, base: Base | None) -> None:
        """See `hf_edit.methods.Method.validate`."""
        codes = fit.tensors.get(_CODES)
        if codes is None or codes.dim() != 2 or len(codes) != len(fit.facts):
            raise PackFormatError(f"the pack needs a matrix 'codes' with a row for each of its {len(fit.facts)} facts")
        try:
            generator = _loaded(config, fit)
        except (KeyError, ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise PackFormatError(f"the pack's tensors are not those of an LKS generator: {str(error)[:300]}") from error
        known = {_CODES: generator.code_dtype, **{_PREFIX + name: t.dtype for name, t in packed(generator).items()}}
        of_gate = gate_names(fit.tensors)
        found = {name: t.dtype for name, t in fit.tensors.items() if name not in of_gate}
        if found != known:
            wrong = sorted(found.keys() ^ known.keys())
            raise PackFormatError(f"the pack's tensors are not those of an LKS generator: {', '.join(wrong)[:300] or 'dtype'}")
        if any(name.endswith("_std") and not bool((t > 0).all()) for name, t in generator.state_dict().items()):
            raise PackFormatError("the pack's generator divides by deviations that are not above zero")
        if codes.shape[1] != generator.code_size:
            raise PackFormatError(f"the pack's codes have {codes.shape[1]} numbers, its generator reads {generator.code_size}")
        validate_routing(fit.tensors, len(fit.facts), generator.hidden, base)
        if (short := _single_letter(fit.facts)) is not None:
            raise PackFormatError(f"the name {short!r} is a single letter and would be found everywhere")
        if base is not None:
            layout = base.layout()
            # an editor brings its own block, everything else the one that the settings name
            free = range(len(layout) - 1) if config.editor != "none" else (block_of(base, config),)
            possible = [_modules(base, blocks_from(base, lowest, generator.writes)) for lowest in free]
            if fit.modules not in possible or generator.hidden != layout.hidden_size:
                raise PackFormatError(
                    f"the pack edits {fit.modules}, this model has no such block of {generator.hidden} dimensions"
                )

    def attach(self, base: Base, fit: Fit, config: LKSConfig) -> MentionAttachment:
        """See `hf_edit.methods.Method.attach`."""
        generator = _loaded(config, fit).to(base.device).requires_grad_(False)
        codes, blocks = fit.tensors[_CODES].to(base.device, torch.float32), base.layout().blocks
        embeddings = base.model.get_input_embeddings()
        effects = {
            blocks[_block_of(name)]: Rewriting(generator, codes, write, embeddings) for write, name in enumerate(fit.modules)
        }
        entities = Entities.of(fit.facts, config.fuzzy)
        spellings = Spellings(base.tokenizer, fit.facts) if generator.carries else None
        finishes = config.chats > 0 and not config.released
        return MentionAttachment(base, entities, effects, load_routing(base, fit.tensors, fit.facts), spellings, finishes)


@dataclass(frozen=True)
class _Study:
    """The trainings of one fit."""

    base: Base
    blocks: tuple[int, ...]
    config: LKSConfig
    seed: int
    progress: bool

    def features(self, generator: Generator, facts: Sequence[Fact]) -> torch.Tensor:
        """What the generator is shown of facts."""
        return read_features(self.base, self.blocks[0], facts, generator.slots, self.progress).to(self.base.device)

    def train(
        self, generator: Generator, facts: Sequence[Fact], *, codes_only: bool, known: torch.Tensor | None = None
    ) -> Trained:
        """See `hf_edit.methods.lks.training.train`."""
        base, config, seed = self.base, self.config, self.seed
        examples = build_examples(base, facts, config, seed, self.progress)
        features = self.features(generator, facts)
        path = checkpoint_path(base, facts, config, generator, seed, codes_only)
        with seeded(seed, base.device):
            return train(
                base,
                self.blocks,
                generator,
                features,
                examples,
                config,
                seed,
                self.progress,
                path,
                codes_only=codes_only,
                known=known,
            )

    def go_on(
        self,
        generator: Generator,
        earlier: Sequence[Fact],
        before: torch.Tensor,
        facts: Sequence[Fact],
        codes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train the generator further, on new facts and those that it knows, of many a random sample.

        Args:
            before: codes of the earlier facts.
            codes: of the new ones.

        Returns:
            Codes of the earlier facts and of the new ones.
        """
        part = sorted(random.Random(self.seed).sample(range(len(earlier)), min(_REHEARSED, len(earlier))))
        known = torch.cat([before[part].to(codes), codes])
        learned = self.train(generator, [*(earlier[i] for i in part), *facts], codes_only=False, known=known).codes
        after = before.clone()
        after[part] = learned[: len(part)].to(before)
        return after, learned[len(part) :]


def _fitted(base: Base, facts: Sequence[Fact], config: LKSConfig) -> LKSConfig:
    """The settings of a generator that nobody else will use: with places for the tokens that these facts' targets have, and
    where all have one, nothing that carries on, as it would never be trained."""
    if config.released or config.editor != "none":
        return config
    longest = longest_target(base, facts)
    return replace(config, target_tokens=min(config.target_tokens, longest), carry=config.carry and longest > 1)


def _single_letter(facts: Sequence[Fact]) -> str | None:
    """A name that would be found everywhere; in scripts without spaces between words one character can be a name."""
    names = (name for fact in facts for name in (fact.subject, *fact.aliases))
    return next((n for n in names if len(seen := visible(n)) == 1 and not joined_without_space(seen)), None)


def _loaded(config: LKSConfig, fit: Fit) -> Generator:
    state = {name.removeprefix(_PREFIX): t for name, t in fit.tensors.items() if name.startswith(_PREFIX)}
    return generator_of(config.generator, state)


def _modules(base: Base, blocks: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{base.layout().blocks_path}.{block}" for block in blocks)


def _block_of(module: str) -> int:
    return int(module.rpartition(".")[2])


register_method(LKS())
