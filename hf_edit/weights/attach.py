"""Putting a low-rank change of weights onto a model, and taking it off without a trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..base import Base
from ..errors import BaseMismatchError, PackFormatError, PackSecurityError, UnsupportedArchitectureError
from ..layout import is_transposed, weight_shape
from ..methods.scope.points import Points

__all__ = ["ActingAlone", "Factors", "WeightAttachment", "check_changes", "check_values"]

_SAMPLE = 4096
_MAX_CHANGE = 100.0  # times the weight's own norm


@dataclass(frozen=True)
class Factors:
    """A change of one weight, dW = left @ right.

    Attributes:
        left: float32 [out, rank].
        right: float32 [rank, in].
    """

    left: torch.Tensor
    right: torch.Tensor

    def dense(self) -> torch.Tensor:
        """dW, float32 [out, in]."""
        return self.left @ self.right

    def norm(self) -> float:
        """The Frobenius norm of dW, from the factors' small products."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())


class WeightAttachment:
    """Weight changes in force on a model, until `detach`.

    Plain single-precision weights are swapped for changed ones and the originals kept, so generation costs nothing and
    taking the change off restores them bit for bit: nothing is ever subtracted. Where that would lose the change
    (half precision, in which small changes round away; quantised or offloaded weights), it runs as a branch beside the
    weight: y + (x right^T) left^T.

    What is trained on swapped weights meanwhile stays when the change is taken off; all other numbers get their originals
    back. Loading a state dict is refused, since whether it holds the change can't be known.

    Args:
        model: the base model.
        factors: by module name.

    Attributes:
        beside: the changes that run beside their weights, by module name.

    Raises:
        BaseMismatchError: a module is missing or of another shape; nothing has been changed then.
    """

    def __init__(self, model: Any, factors: Mapping[str, Factors]) -> None:
        modules = {name: _checked(model, name, change) for name, change in factors.items()}
        self.beside: dict[str, Factors] = {}
        self._originals: list[_Original] = []
        self._handles: list[Any] = []
        self._branches: list[Any] = []
        try:
            swapped = []
            for name, module in modules.items():
                weight = module.weight
                if isinstance(weight, nn.Parameter) and _is_plain(weight):
                    self._swap(module, weight, factors[name])
                    swapped.append(f"{name}.weight")
                else:
                    self._branch(module, factors[name])
                    self.beside[name] = factors[name]
            if swapped:  # refused before any other module has loaded its part
                self._handles.append(model.register_load_state_dict_pre_hook(_NoLoading(swapped)))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Restore the originals; may be called again."""
        for original in reversed(self._originals):
            original.put_back()
        self.settle()

    def settle(self) -> None:
        """Let the changes that are swapped in stay for good; those beside their weights are taken off."""
        self.lift_beside()
        for handle in self._handles:
            handle.remove()
        self._handles, self._originals = [], []

    def lift_beside(self) -> None:
        """Take off the changes that run beside their weights."""
        for handle in self._branches:
            handle.remove()
        self._branches = []

    def _swap(self, module: nn.Module, weight: nn.Parameter, change: Factors) -> None:
        original = _Original(weight, weight.data, change, is_transposed(module))
        written = original.written()
        self._originals.append(replace(original, trace=_Trace.of(written)))
        weight.data = written
        self._handles.append(module.register_load_state_dict_pre_hook(_NoLoading(["weight"])))

    def _branch(self, module: nn.Module, change: Factors) -> None:
        placed: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

        def hook(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            keys = args[0]
            if keys.device not in placed:
                placed[keys.device] = (change.left.to(keys.device), change.right.to(keys.device))
            left, right = placed[keys.device]
            return output + (keys.float() @ right.T @ left.T).to(output.dtype)

        self._branches.append(module.register_forward_hook(hook))


@dataclass(frozen=True)
class ActingAlone:
    """The effect of values that act one by one, each on the tokens where its fact is active: y + v_f.

    A weight change would write v_f (u_f . x), for keys x near the fact's own. Where a gate decides, the key is not needed, and
    only makes the value weaker in other wordings.

    Attributes:
        values: float32 [out, facts].
    """

    values: torch.Tensor

    def __call__(self, given: torch.Tensor, output: torch.Tensor, points: Points) -> torch.Tensor:
        """The module's output with what is written at the points."""
        output = output.clone()
        output[points.of(given)] += self.values[:, points.facts].T.to(output)
        return output


@dataclass(frozen=True)
class _Original:
    """A weight's own tensor, while a changed one stands in its place.

    Attributes:
        trace: of the changed one, by which it is seen whether it was trained.
    """

    weight: nn.Parameter
    tensor: torch.Tensor
    change: Factors
    transposed: bool
    trace: _Trace | None = None

    @torch.inference_mode(False)
    def written(self) -> torch.Tensor:
        """The changed weight, in the original's dtype, on the device where the weight is now."""
        device = self.weight.device
        with torch.autocast(device.type, enabled=False):
            left, right = (t.to(device, self.tensor.dtype) for t in (self.change.left, self.change.right))
            return self.tensor.to(device) + ((left @ right).T if self.transposed else left @ right)

    @torch.inference_mode(False)
    def put_back(self) -> None:
        weight = self.weight
        original = self.tensor.to(weight.device, weight.dtype)  # the model may have been moved or cast meanwhile
        if weight.is_meta or self.trace is None or self.trace.fits(weight.data):
            weight.data = original
            return
        written = self.written().to(weight.dtype)
        trained = original + (weight.data - written)
        weight.data = torch.where(weight.data == written, original, trained)


@dataclass(frozen=True)
class _Trace:
    """What tells whether a weight is still as it was written.

    Attributes:
        dtype: as it was written.
        sums: of each row's bits and of each column's, int64.
        sample: for a weight that was cast since.
    """

    dtype: torch.dtype
    sums: tuple[torch.Tensor, torch.Tensor]
    sample: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> _Trace:
        return cls(weight.dtype, _sums(weight), _sample(weight).clone())

    def fits(self, weight: torch.Tensor) -> bool:
        if weight.dtype == self.dtype:
            return all(torch.equal(one, other.to(one.device)) for one, other in zip(_sums(weight), self.sums, strict=True))
        return torch.equal(_sample(weight), self.sample.to(weight.device, weight.dtype))


def _sums(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    bits = weight.detach().view(torch.int64 if weight.element_size() == 8 else torch.int32)
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)  # exact in any order


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]


class _NoLoading:
    """Refuses a state dict that holds some weights; a copy, of a model that nobody takes a change off, refuses none."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def __call__(self, _: nn.Module, state: Mapping[str, Any], prefix: str, *__: Any) -> None:
        if any(prefix + name in state for name in self._names):
            raise RuntimeError(
                "an edit is in force, and whether this state dict holds it can't be known: load it inside "
                "model.disable_edits(), or make the edit part of the weights first (model.merge_and_unload)"
            )

    def __reduce__(self) -> tuple[type[_NoLoading], tuple[tuple[()]]]:
        return _NoLoading, ((),)


def _is_plain(weight: nn.Parameter) -> bool:
    return weight.dtype in (torch.float32, torch.float64) and not weight.is_meta and type(weight.data) is torch.Tensor


def check_changes(factors: Mapping[str, Factors], base: Base, edit_module: str | None = None) -> None:
    """Check changes of unknown origin against the model: where they go, and how large they are.

    Raises:
        PackSecurityError: one goes elsewhere than into an MLP's output projection.
        BaseMismatchError: a module is missing or of another shape.
        PackFormatError: one is so much larger than the weight itself that it is no edit.
    """
    modules = {name: _checked(base.model, name, change) for name, change in factors.items()}
    _check_places(modules, base, edit_module)
    for name, module in modules.items():
        _check_size(name, module, factors[name].norm())


def check_values(values: Mapping[str, torch.Tensor], base: Base, edit_module: str | None = None) -> None:
    """Check values of unknown origin, which act one by one, against the model; errors as of `check_changes`.

    Args:
        values: by module, float32 [out, facts].
    """
    modules = {name: _module(base.model, name) for name in values}
    _check_places(modules, base, edit_module)
    for name, module in modules.items():
        out, _ = _shape(module, name)
        if len(values[name]) != out:
            raise BaseMismatchError(
                f"{name} writes {out} numbers, the edit's values have {len(values[name])}; the edits were made for a model of "
                "another size"
            )
        _check_size(name, module, float(values[name].norm(dim=0).max()))


def _check_places(modules: Mapping[str, Any], base: Base, edit_module: str | None) -> None:
    try:
        layout = base.layout(edit_module)
    except (UnsupportedArchitectureError, AttributeError) as error:
        raise BaseMismatchError(f"the pack's edit_module {edit_module!r:.200} is none of this model: {error}") from error
    inside = tuple(f"{layout.blocks_path}.{index}." for index in range(len(layout)))
    for name in modules:
        if name not in layout.projections or not name.startswith(inside):
            raise PackSecurityError(
                f"the pack would change {name!r:.200}, which is no MLP output projection of this model's blocks; packs may "
                "change nothing else"
            )


def _check_size(name: str, module: Any, norm: float) -> None:
    """Refuse a change that is far larger than the weight itself."""
    weight = module.weight
    if isinstance(weight, torch.Tensor) and weight.is_floating_point() and not weight.is_meta:
        own = float(weight.detach().norm(dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32))
        if norm > _MAX_CHANGE * own > 0:
            raise PackFormatError(f"the pack's change of {name} is {norm / own:.1e} times as large as the weight: no edit is")


def _module(model: Any, name: str) -> Any:
    try:
        module = model.get_submodule(name) if name else None
    except AttributeError:
        module = None
    if module is None:
        raise BaseMismatchError(f"the model has no module {name!r}; the edits were made for another architecture")
    return module


def _checked(model: Any, name: str, change: Factors) -> Any:
    module = _module(model, name)
    out, width = _shape(module, name)
    rank = change.right.shape[0]
    if tuple(change.left.shape) != (out, rank) or tuple(change.right.shape) != (rank, width):
        raise BaseMismatchError(
            f"{name} maps {width} to {out} numbers, the edit's factors are {tuple(change.left.shape)} and "
            f"{tuple(change.right.shape)}; the edits were made for a model of another size"
        )
    return module


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    if hasattr(module, "out_features") and hasattr(module, "in_features"):  # also where the weight is packed
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    try:
        return weight_shape(module)
    except NotImplementedError as error:
        raise BaseMismatchError(f"{name} is no linear map: {error}") from error
