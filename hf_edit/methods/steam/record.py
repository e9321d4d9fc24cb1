"""What a pack keeps of how its facts were inserted, so that they can be inserted again without some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...errors import PackFormatError
from ...facts import Fact, fold
from ...weights.editors import EDITORS, ONE_BY_ONE

__all__ = ["RECORD", "Group", "Record", "groups_of"]

_VALUES, _EDITS = RECORD = ("values", "edits")  # the names of its tensors
_EDITORS = tuple(EDITORS)


@dataclass(frozen=True)
class Group:
    """Facts that are inserted together, on top of the groups before.

    Attributes:
        facts: their indices.
        editor: the base editor.
        seed: of the contexts that their keys are read behind.
    """

    facts: tuple[int, ...]
    editor: str
    seed: int


@dataclass(frozen=True)
class Record:
    """The facts' values, and the edits that brought them in.

    Attributes:
        values: float32 [facts, insertions, hidden], the residuals as they were inserted: one a fact, or where blocks normalise
            what an MLP writes, one for each layer, ascending. Zero where another edit of the pack had more layers.
        edits: int64 [edits, 3], in the order of the facts: how many facts, the seed, the editor's number.
    """

    values: torch.Tensor
    edits: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, seed: int, editor: str) -> Record:
        """The record of one edit."""
        signed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)  # torch takes both for the same seed
        return cls(values.float().cpu(), torch.tensor([[len(values), signed, _EDITORS.index(editor)]]))

    @classmethod
    def read(cls, tensors: Mapping[str, torch.Tensor]) -> Record:
        """The record among a pack's tensors."""
        return cls(tensors[_VALUES], tensors[_EDITS])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The record as a pack's tensors."""
        return {_VALUES: self.values, _EDITS: self.edits}

    def behind(self, tensors: Mapping[str, torch.Tensor]) -> Record:
        """This record behind the one among a pack's tensors, where there is one."""
        if not tensors:
            return self
        first = Record.read(tensors)
        most = max(first.values.shape[1], self.values.shape[1])
        padded = [torch.nn.functional.pad(v, (0, 0, 0, most - v.shape[1])) for v in (first.values, self.values)]
        return Record(torch.cat(padded), torch.cat([first.edits, self.edits]))

    def kept(self, keep: Sequence[int]) -> Record:
        """The record with the facts `keep`, ascending; edits that are left with none are gone."""
        edit_of = torch.repeat_interleave(self.edits[:, 0])
        edits = self.edits.clone()
        edits[:, 0] = torch.bincount(edit_of[list(keep)], minlength=len(edits))
        return Record(self.values[list(keep)], edits[edits[:, 0] > 0])

    def groups(self, facts: Sequence[Fact]) -> list[Group]:
        """The facts group by group, in the order in which they are inserted."""
        found, first = [], 0
        for count, seed, number in self.edits.tolist():
            editor = _EDITORS[number]
            groups = groups_of(facts[first : first + count], editor)
            found += [Group(tuple(first + i for i in group), editor, seed) for group in groups]
            first += count
        return found

    @staticmethod
    def validate(tensors: Mapping[str, torch.Tensor], facts: int, layers: int, hidden: int) -> None:
        """Check a record of unknown origin.

        Args:
            facts: how many the pack has.
            layers: how many it edits.
            hidden: the model's width.

        Raises:
            PackFormatError: its tensors are not of the right type or shape, or tell of other numbers of facts.
        """
        values, edits = (tensors[name] for name in RECORD)
        most = values.shape[1] if values.dim() == 3 else 0
        if values.dtype != torch.float32 or values.shape != (facts, most, hidden) or not 1 <= most <= layers:
            raise PackFormatError(
                f"the pack's values must be float32 of shape [{facts}, 1 to {layers}, {hidden}], not {values.dtype} "
                f"{list(values.shape)}"
            )
        if edits.dtype != torch.int64 or edits.dim() != 2 or edits.shape[1] != 3 or not 1 <= len(edits) <= facts:
            raise PackFormatError(f"the pack's edits must be int64 [edits, 3], not {edits.dtype} {list(edits.shape)}")
        rows = edits.tolist()  # in Python, where sums do not overflow
        if any(count < 1 for count, _, _ in rows) or sum(count for count, _, _ in rows) != facts:
            raise PackFormatError(f"the pack's edits are not of {facts} facts")
        if any(not 0 <= number < len(_EDITORS) for _, _, number in rows):
            raise PackFormatError(f"the pack's edits name an editor that is none; there are {len(_EDITORS)}")


def groups_of(facts: Sequence[Fact], editor: str) -> list[list[int]]:
    """Indices of an edit's facts that are inserted together, group on top of group: by ROME one by one, by the others all that
    have subjects of their own. In the order of these groups, facts give the same groups again."""
    return [[i] for i in range(len(facts))] if editor in ONE_BY_ONE else _apart(facts)


def _apart(facts: Sequence[Fact]) -> list[list[int]]:
    """Indices of facts that can be edited together: no two of a group are about the same subject, whose one key would get the
    mean of both values."""
    groups: list[list[int]] = []
    taken: list[set[str]] = []
    for i, fact in enumerate(facts):
        subject = fold(fact.subject)
        free = next((n for n, subjects in enumerate(taken) if subject not in subjects), len(groups))
        if free == len(groups):
            groups.append([])
            taken.append(set())
        groups[free].append(i)
        taken[free].add(subject)
    return groups
