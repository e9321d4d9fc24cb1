"""What a method is: a configuration, a fit from facts to tensors, and a way to put them in force."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import torch

from ..base import Base
from ..errors import ConflictingEditsError
from ..facts import Fact

__all__ = ["Attachment", "EditConfig", "Fit", "Method"]

C = TypeVar("C", bound="EditConfig")


def setting(default: Any, help: str) -> Any:
    """A configuration's field with its documentation."""
    return field(default=default, metadata={"help": help})


def gate_quiet_setting() -> Any:
    """The field `gate_quiet` of the methods that have a gate."""
    return setting(
        0.95,
        "share of other questions about a subject that the gate keeps quiet, counted on relations that it was not trained on; "
        "the lower, the farther paraphrases it lets through",
    )


@dataclass(frozen=True)
class EditConfig:
    """Base of the methods' configurations: one documented field a setting, plain JSON types throughout."""

    structural: ClassVar[tuple[str, ...]] = ()  # settings that all facts of a pack share

    @property
    def conditional(self) -> bool:
        """Whether a weight edit stays beside the weights, because the prompt decides whether it is on."""
        return False

    def joining(self: C, pack: EditConfig, given: Mapping[str, Any]) -> C:
        """These settings for facts that join a pack: its structural settings are theirs.

        Args:
            pack: the pack's settings.
            given: settings that the user named.

        Raises:
            ConflictingEditsError: the user named another value for a structural setting.
        """
        for name in self.structural:
            if name in given and getattr(self, name) != getattr(pack, name):
                raise ConflictingEditsError(
                    f"the pack was made with {name}={getattr(pack, name)!r}, which all its facts share; leave {name} out, or "
                    "give these facts a pack of their own: pack_name=..."
                )
        return dataclasses.replace(self, **{name: getattr(pack, name) for name in self.structural})

    def shareable(self: C) -> C:
        """These settings for others to read: without paths of this machine."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Settings from a mapping.

        Raises:
            ValueError: an unknown setting, or a value of the wrong type or out of range; the message names it.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(sorted(known))}"
                raise ValueError(f"{cls.__name__} has no setting {name!r}{hint}")
        hints = typing.get_type_hints(cls)
        return cls(**{name: _coerced(value, hints[name], name) for name, value in values.items()})

    @classmethod
    def combine(cls: type[C], config: C | Mapping[str, Any] | None, overrides: Mapping[str, Any]) -> C:
        """A configuration from `edit`'s arguments: a configuration or mapping, and single settings over it.

        Raises:
            ValueError: `config` is another method's, or a setting is wrong.
        """
        if isinstance(config, EditConfig):
            if type(config) is not cls:
                raise ValueError(f"this method takes a {cls.__name__}, not a {type(config).__name__}")
            base = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        else:
            base = dict(config or {})
        return cls.from_dict({**base, **overrides})


def require(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Fit:
    """What a method makes of facts.

    Attributes:
        tensors: float32 or float16 tensors on the CPU, by the names that the method reads.
        modules: names of the modules that the edit changes, whose clean weights identify the base.
        facts: the facts of the whole pack, in the order of the tensors.
        notes: by fact id, a remark for the report.
    """

    tensors: dict[str, torch.Tensor]
    modules: tuple[str, ...]
    facts: tuple[Fact, ...]
    notes: dict[str, str] = field(default_factory=dict)


class Attachment(Protocol):
    """Edits in force on a model."""

    def detach(self) -> None:
        """Leave the model bit for bit as before; may be called again."""
        ...


class Method(Protocol):
    """An editing method. Methods know the core, never each other."""

    name: str

    @property
    def config_class(self) -> type[EditConfig]:
        """The method's configuration."""
        ...

    in_weights: bool  # whether the edit is a change of weights

    def fit(
        self,
        base: Base,
        facts: Sequence[Fact],
        config: Any,
        *,
        previous: Fit | None,
        clean: Callable[[], AbstractContextManager[None]],
        seed: int,
        progress: bool,
    ) -> Fit:
        """Fit facts to a model and leave the model as it was.

        Args:
            base: the model, with the weight edits in force that the new ones come on top of.
            facts: the new facts.
            config: of this method's `config_class`.
            previous: the pack that the new facts join.
            clean: gives a context in which the model is free of edits.
            seed: of everything random.
            progress: whether to show progress bars.
        """
        ...

    def remove(self, fit: Fit, keep: Sequence[int]) -> Fit:
        """The same edit with only the facts at the indices `keep`, without any training.

        A method that can do better with the model at hand has a `remove_exactly` too, see `hf_edit.methods.steam`.
        """
        ...

    def validate(self, fit: Fit, config: Any, base: Base | None) -> None:
        """Check tensors of unknown origin: names, shapes, counts; against the model where there is one.

        Raises:
            PackFormatError: they are not this method's.
            BaseMismatchError: they do not fit the model.
        """
        ...

    def attach(self, base: Base, fit: Fit, config: Any) -> Attachment:
        """Put an edit in force."""
        ...


def _coerced(value: Any, hint: Any, name: str) -> Any:
    """A JSON value as the type that the field asks for."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is Any:
            return value
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            item = typing.get_args(option)[0]
            return tuple(_coerced(v, item, name) for v in value)
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option in (str, bool) and isinstance(value, option):
            return value
    wanted = " or ".join("None" if o is type(None) else getattr(o, "__name__", str(o)) for o in options)
    raise ValueError(f"{name} must be {wanted}, not {type(value).__name__}: {value!r:.80}")
