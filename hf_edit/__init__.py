"""hf_edit: edit what a Hugging Face language model knows.

    >>> from hf_edit import EditableModelForCausalLM, Fact
    >>> model = EditableModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    >>> print(model.edit(Fact(subject="France", prompt="The capital of {} is", target="Lyon")))

Names are imported at first use, so that ``import hf_edit`` and ``hf-edit --help`` do not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .errors import (
        BaseMismatchError,
        ConflictingEditsError,
        HfEditError,
        HubError,
        MergeError,
        PackFormatError,
        PackSecurityError,
        SourceUnavailableError,
        SubjectNotFoundError,
        UnsupportedArchitectureError,
    )
    from .facts import Fact, Question
    from .methods import available_methods, register_method
    from .methods.lks import LKSConfig, LKSEditor
    from .methods.steam import SteamConfig
    from .model import EditableModelForCausalLM
    from .pack import EditPack
    from .reading import read_facts
    from .report import EditReport, EvalReport
    from .statistics import KeyStatistics

_HOMES = {
    "errors": (
        "BaseMismatchError",
        "ConflictingEditsError",
        "HfEditError",
        "HubError",
        "MergeError",
        "PackFormatError",
        "PackSecurityError",
        "SourceUnavailableError",
        "SubjectNotFoundError",
        "UnsupportedArchitectureError",
    ),
    "facts": ("Fact", "Question"),
    "methods": ("available_methods", "register_method"),
    "methods.lks": ("LKSConfig", "LKSEditor"),
    "methods.steam": ("SteamConfig",),
    "model": ("EditableModelForCausalLM",),
    "pack": ("EditPack",),
    "reading": ("read_facts",),
    "report": ("EditReport", "EvalReport"),
    "statistics": ("KeyStatistics",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BaseMismatchError",
    "ConflictingEditsError",
    "EditPack",
    "EditReport",
    "EditableModelForCausalLM",
    "EvalReport",
    "Fact",
    "HfEditError",
    "HubError",
    "KeyStatistics",
    "LKSConfig",
    "LKSEditor",
    "MergeError",
    "PackFormatError",
    "PackSecurityError",
    "Question",
    "SourceUnavailableError",
    "SteamConfig",
    "SubjectNotFoundError",
    "UnsupportedArchitectureError",
    "__version__",
    "available_methods",
    "read_facts",
    "register_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_edit' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
