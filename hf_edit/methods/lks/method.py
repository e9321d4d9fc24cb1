"""LKS as a method: features, training, and a pack of a generator and a code a fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from ...base import Base, seeded
from ...errors import PackFormatError
from ...facts import Fact, visible
from ...mentions import MentionAttachment, Spellings
from ...positions import joined_without_space
from ...routing import fit_routing, gate_names, kept_routing, load_routing, validate_routing
from ...scope import Entities
from ...suffix import frozen
from .. import Fit, register_method
from .attach import Rewriting
from .config import LKSConfig
from .editor import block_of, blocks_from, checkpoint_path, open_editor
from .examples import build_examples
from .features import longest_target, read_features
from .generator import Generator, generator_of, packed
from .training import train

__all__ = ["LKS"]

_PREFIX = "generator."
_CODES = "codes"
_FEW = 64  # facts; so few are fitted by their codes alone, on a generator that was trained beforehand


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
        """See `hf_edit.methods.Method.fit`. Facts that join a pack get codes for its generator; the pack's own stay as they
        are, bit for bit."""
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
            features = read_features(base, block, facts, generator.slots, progress).to(base.device)
            codes_only = trained and not config.released and (previous is not None or len(facts) <= _FEW)
            if config.train and not (codes_only and config.code_lr == 0):
                examples = build_examples(base, facts, config, seed, progress)
                path = checkpoint_path(base, facts, config, start, seed)
                with seeded(seed, base.device):
                    codes = train(
                        base, blocks, generator, features, examples, config, seed, progress, path, codes_only=codes_only
                    )
            else:
                codes = generator.encode(features)
            everything = (*(previous.facts if previous else ()), *facts)
            known = previous.tensors if previous else {}
            gate: dict[str, torch.Tensor] = {}
            if config.gate:
                telling: Sequence[Fact] = facts if config.train_on_rephrases else ()
                gate = fit_routing(base, everything, known, clean, seed, progress, config.gate_quiet, block, learned, telling)
        codes = codes.detach().to(generator.code_dtype).cpu()
        tensors = {_PREFIX + name: t for name, t in packed(generator).items()} | gate
        tensors[_CODES] = codes if previous is None else torch.cat([previous.tensors[_CODES], codes])
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
        return MentionAttachment(base, entities, effects, load_routing(base, fit.tensors, fit.facts), spellings)


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
