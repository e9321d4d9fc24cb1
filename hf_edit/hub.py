"""The Hugging Face Hub: files of one commit come in, files of one commit go out, and errors say what to do.

Whatever saves itself into a folder can be shared: it derives from `PushToHub`, and reads itself from the folder that
`fetch` gives.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import validate_repo_id

from ._version import __version__
from .errors import HubError, PackFormatError, PackSecurityError

__all__ = [
    "PushToHub",
    "Snapshot",
    "api",
    "check_base_of",
    "explained",
    "fetch",
    "is_full_sha",
    "is_repo_id",
    "resolve",
    "safetensors_header",
]


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit of a repo, or those of a local folder.

    Attributes:
        folder: where they are.
        repo_id: None for a local folder.
        revision: the commit's full sha; None for a local folder.
    """

    folder: Path
    repo_id: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        """For messages: the folder, or the repo and its commit."""
        return str(self.folder) if self.repo_id is None else f"{self.repo_id} (commit {str(self.revision)[:8]})"

    def __truediv__(self, name: str) -> Snapshot:
        """The folder below this one."""
        return replace(self, folder=self.folder / name)


def api(token: str | bool | None = None) -> HfApi:
    """The Hub's client."""
    return HfApi(library_name="hf_edit", library_version=__version__, token=token)


def is_repo_id(name: Any) -> bool:
    """Whether this is the id of a repo as the Hub writes it; it says nothing of whether there is one."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return isinstance(name, str)


def is_full_sha(revision: Any) -> bool:
    """Whether this names a commit for good, as branches and tags don't."""
    return isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def resolve(
    repo_id: str,
    revision: str | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """The full sha of a branch, tag or pull request; without a connection the one that the cache knows.

    Raises:
        HubError: there is no such repo or revision, or it can't be asked.
    """
    if is_full_sha(revision):
        return str(revision)
    with explained(repo_id, revision):
        found = api(token).resolve_revision(
            repo_id,
            revision=revision,
            cache_dir=None if cache_dir is None else str(cache_dir),
            local_files_only=local_files_only,
            token=token,
        )
    return found.resolved


def fetch(
    name: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> Snapshot:
    """A local folder as it is, or a repo's files, all of one commit even when the branch moves meanwhile.

    Args:
        name: a folder; where there is none of this name, the id of a repo. A `Path` is never an id.
        patterns: which of the repo's files, as in `snapshot_download`.
        revision: branch, tag, pull request (``refs/pr/1``) or sha; by default the main branch.
        cache_dir: the Hub's cache by default.
        token: by default the one that was logged in with.
        force_download: even what is in the cache.
        local_files_only: only what is in the cache.

    Raises:
        FileNotFoundError: there is no such folder, and the name is no repo's either.
        HubError: the repo is missing, gated, or out of reach.
    """
    if force_download and local_files_only:
        raise ValueError("force_download and local_files_only contradict each other; give one of them")
    if isinstance(name, os.PathLike) or os.path.exists(name) or not is_repo_id(name):
        if not os.path.isdir(name):
            raise FileNotFoundError(f"there is no folder {os.fspath(name)}" + ("" if is_repo_id(str(name)) else _NO_ID))
        return Snapshot(Path(name))
    sha = resolve(name, revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
    with explained(name, revision):
        folder = snapshot_download(
            name,
            revision=sha,
            allow_patterns=list(patterns),
            ignore_patterns=[".*", "*/.*"],  # patterns match across "/", and nothing of ours lies in a dot folder
            cache_dir=None if cache_dir is None else str(cache_dir),
            token=token,
            force_download=force_download,
            local_files_only=local_files_only,
            library_name="hf_edit",
            library_version=__version__,
        )
    return Snapshot(Path(folder), name, sha)


_NO_ID = ", and this is no id of a repo on the Hub (USER/NAME) either"


def safetensors_header(at: Snapshot, path: str, token: str | bool | None = None) -> tuple[dict[str, Any], int]:
    """Tensors' dtypes and shapes, by name, from the header of a file on the Hub, and the file's bytes; no tensor is read.

    Raises:
        HubError: the repo is out of reach.
        PackFormatError: there is no such file, or it is no safetensors file.
    """
    client, repo_id = api(token), str(at.repo_id)
    with explained(repo_id, at.revision):
        entries = client.get_paths_info(repo_id, path, revision=at.revision)
        if not entries:
            raise PackFormatError(f"{at.name} has no {path}: the pack is incomplete")
        try:
            header = client.parse_safetensors_file_metadata(repo_id, path, revision=at.revision)
        except SafetensorsParsingError as error:
            raise PackFormatError(f"{at.name}: {path} is no valid safetensors file: {error}") from error
    tensors = {name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for name, tensor in header.tensors.items()}
    return tensors, getattr(entries[0], "size", 0)


def check_base_of(config: Mapping[str, Any], at: Snapshot) -> None:
    """A pack from the Hub may name a base on the Hub only, and that at a commit for good.

    Args:
        config: `base_model_name_or_path` and `base_model_revision` of the pack.

    Raises:
        PackSecurityError: it names something else.
    """
    if at.repo_id is None:
        return
    name, revision = config["base_model_name_or_path"], config["base_model_revision"]
    if name is not None and not is_repo_id(name):
        raise PackSecurityError(
            f"{at.name} names the base {name!r:.200}, which is no id of a repo on the Hub. If you trust the pack, download it "
            "and load the folder; if it is yours, push it with push_to_hub, which leaves local paths out"
        )
    if revision is not None and not is_full_sha(revision):
        raise PackSecurityError(f"{at.name} names the base's revision {revision!r:.200}, which is no full sha of a commit")


def _add_tags(path: Path, tags: Sequence[str]) -> None:
    card = ModelCard(path.read_text("utf-8"))
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *tags]))
    path.write_text(str(card), encoding="utf-8", newline="\n")


class PushToHub:
    """Gives `push_to_hub` to what can write its files into a folder.

    transformers' mixin of this purpose writes a generic card over README.md, huggingface_hub's a config.json.
    """

    # writes the files into an empty folder, for a repo of the id given, and returns a line that says what they are
    _write_for_hub: Callable[..., str]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] | str | None = None,
        **what: Any,
    ) -> CommitInfo:
        """Share this on the Hub: one commit, in a repo that is made where there is none. Never the base model's weights.

        Args:
            repo_id: ``USER/NAME``, or ``NAME`` for your own.
            commit_message: by default what is pushed, in a line.
            commit_description: the commit's text, and that of the pull request.
            private: whether a repo that is made is private; by default as the namespace has it.
            token: by default the one that you logged in with (``hf auth login``).
            revision: the branch to push to, made where there is none; by default the main branch.
            create_pr: open a pull request, which also serves for other people's repos.
            tags: further tags for the model card.
            **what: what of it to push, where there is a choice (`selected_packs` of a model, `pack_name` of a pack).

        Returns:
            The client's account of the commit: `oid` (the full sha), `commit_url`, `pr_url`, ...

        Raises:
            HubError: the repo may not be written to, or the Hub is out of reach.
        """
        client = api(token)
        with explained(repo_id, revision, writing=True), tempfile.TemporaryDirectory() as temporary:
            if "/" not in repo_id:
                repo_id = f"{client.whoami()['name']}/{repo_id}"
            # written before anything is made on the Hub: what can't be written leaves no empty repo behind
            folder = Path(temporary)
            line = self._write_for_hub(folder, repo_id, **what)
            if tags:
                for path in folder.rglob("README.md"):
                    _add_tags(path, [tags] if isinstance(tags, str) else tags)
            client.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                client.create_branch(repo_id, branch=revision, exist_ok=True)
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            # not `upload_folder`, which may make several commits of one folder
            return client.create_commit(
                repo_id,
                [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in paths],
                commit_message=commit_message or line,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


@contextmanager
def explained(repo_id: str, revision: str | None, *, writing: bool = False) -> Iterator[None]:
    """The client's errors as `HubError`, with the way out. No token is in its text.

    Args:
        repo_id: what is asked for, as is `revision`.
        writing: whether it is to be written to.
    """
    page = f"{constants.ENDPOINT}/{repo_id}"
    log_in = "log in (hf auth login) or pass token=..."
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise HubError(f"there is no token to reach {repo_id} with: {log_in}") from error
    except GatedRepoError as error:
        raise HubError(f"{repo_id} is gated: ask for access on {page}, then {log_in}") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no revision {revision or 'main'!r}: see {page}/commits/main") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"there is no repo {repo_id!r} on the Hub, or it is private and you may not see it: check the name, and {log_in}"
        ) from error
    except (RevisionResolutionError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        if (status := _status(error)) in (401, 403):
            raise HubError(f"{repo_id} may not be read with this token (HTTP {status}): {log_in}") from error
        raise HubError(
            f"{repo_id}, revision {revision or 'main'!r}, is not in the cache, or not whole, and the Hub can't be reached or "
            "may not be asked (local_files_only, HF_HUB_OFFLINE): get it once with a connection"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            way = f"{log_in}; a token needs the right to write" if writing else log_in
            also = ", or pass create_pr=True to propose the change" if writing and status == 403 else ""
            raise HubError(f"you may not {'write to' if writing else 'read'} {repo_id} (HTTP {status}): {way}{also}") from error
        raise HubError(f"the Hub refused {repo_id} (HTTP {status}): {error.server_message or 'it gave no reason'}") from error
    except HTTPError as error:
        raise HubError(f"the Hub can't be reached for {repo_id} ({type(error).__name__}): try again") from error
    except RuntimeError as error:  # what the client makes of an upload that fails
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HubError(f"{repo_id}: {str(error).rstrip('.')} ({type(error.__cause__).__name__}): try again") from error


def _status(error: BaseException | None) -> int | None:
    """The HTTP status at the root of an error, if there is one."""
    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return error.response.status_code
        error = error.__cause__
    return None
