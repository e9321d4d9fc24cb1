"""The errors that hf_edit raises: each is an `HfEditError` and also the builtin that one would catch."""


class HfEditError(Exception):
    """Base of all errors of this package."""


class PackFormatError(HfEditError, ValueError):
    """An edit pack is incomplete, damaged, or of a format that this version does not read."""


class PackSecurityError(HfEditError, ValueError):
    """An edit pack asks for something that a pack may not ask for."""


class BaseMismatchError(HfEditError, ValueError):
    """An edit pack was made for another base model or tokenizer than the one at hand."""


class ConflictingEditsError(HfEditError, ValueError):
    """Facts contradict each other or the facts already in force."""


class UnsupportedArchitectureError(HfEditError, NotImplementedError):
    """The model has no part that the method could edit, or none that could be found by structure."""


class SubjectNotFoundError(HfEditError, ValueError):
    """A fact's subject does not stand in its prompt."""


class MergeError(HfEditError, RuntimeError):
    """The edits in force cannot be written into plain weights."""


class SourceUnavailableError(HfEditError, ConnectionError):
    """An online source of reference facts does not answer."""


class HubError(HfEditError, OSError):
    """A repo on the Hub is missing, closed to this user, or out of reach; or it holds nothing of the kind."""
