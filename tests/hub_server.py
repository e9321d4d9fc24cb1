"""A Hub on loopback, as far as the client of `huggingface_hub` looks at one.

    with HubServer() as hub:
        HfApi(endpoint=hub.endpoint, token=hub.token("me")).create_repo("me/lyon")

Two servers, as in the real one: the Hub itself, and the storage that large files are uploaded to and that it redirects
downloads to, which sees no token; it speaks the LFS protocol and Xet. Repos have commits, branches, tags and pull requests;
they can be private or gated. Everything that was asked is in `hub.requests`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from xet_storage import XetStorage

_REPO = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
_REGULAR_BYTES = 10 << 20  # files beyond this, and safetensors of any size, go to the storage
_DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A file's content, in git or in the storage (LFS)."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return text.encode()

    @property
    def oid(self) -> str:
        kept = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A tree of files with its message."""

    sha: str
    files: dict[str, Blob]
    title: str
    description: str
    parent: str | None


@dataclass
class Repo:
    """A model repo. `main`, other branches, tags and pull requests are names of commits."""

    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)  # who may read it besides its owner, where it is private or gated
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, ref: str, files: dict[str, Blob], title: str, description: str = "", parent: str | None = None) -> Commit:
        """Make a commit and let a name point to it."""
        listing = [(path, blob.oid) for path, blob in sorted(files.items())]
        sha = hashlib.sha1(repr((listing, title, description, parent, len(self.commits))).encode()).hexdigest()
        made = Commit(sha, files, title, description, parent)
        self.commits[sha] = made
        self.refs[ref] = sha
        return made

    def at(self, revision: str) -> Commit:
        """The commit of a branch, tag, pull request or full sha.

        Raises:
            RefusedError: there is none.
        """
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def history(self, revision: str) -> Iterator[Commit]:
        """Commits, the newest first."""
        sha: str | None = self.at(revision).sha
        while sha is not None:
            yield self.commits[sha]
            sha = self.commits[sha].parent


@dataclass(frozen=True)
class Request:
    """What a client asked, of the Hub or of the storage."""

    where: str
    method: str
    path: str
    headers: dict[str, str]

    def __str__(self) -> str:
        return f"{self.where} {self.method} {self.path}"


class RefusedError(Exception):
    """An error as the Hub words it: status, X-Error-Code, X-Error-Message."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **headers}


class HubServer:
    """The servers, started by `with`.

    Attributes:
        repos: by id.
        requests: all that was asked so far.
        on_request: called with each request of the Hub before it is answered.
        part_bytes: files larger than this are uploaded in parts of this size.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet = XetStorage()
        self.requests: list[Request] = []
        self.on_request: Callable[[Request], None] | None = None
        self.part_bytes = 64 << 20
        self.page = 1000
        self._users: dict[str, str] = {}
        self._lock = threading.RLock()
        self._hub = _serve(_HubHandler, self)
        self._storage = _serve(_StorageHandler, self)
        self.endpoint = f"http://127.0.0.1:{self._hub.server_address[1]}"
        self.storage = f"http://127.0.0.1:{self._storage.server_address[1]}"

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Be out of reach."""
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()
            server.hang_up()

    def token(self, user: str) -> str:
        """A token with which the client is this user."""
        token = f"hf_{hashlib.sha256(user.encode()).hexdigest()[:34]}"
        self._users[token] = user
        return token

    def user(self, headers: dict[str, str]) -> str | None:
        """Who asks; None without a token.

        Raises:
            RefusedError: nobody has this token.
        """
        given = headers.get("authorization")
        if given is None:
            return None
        token = given.removeprefix("Bearer ")
        if token not in self._users:
            raise RefusedError(401, None, "Invalid credentials in Authorization header")
        return self._users[token]

    def add(self, repo_id: str, files: dict[str, bytes], *, title: str = "initial commit", **settings: Any) -> Commit:
        """A commit on a repo's main branch, as if it had been pushed; further keywords are those of `Repo`."""
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo(repo_id, **settings))
            before = repo.commits[repo.refs["main"]] if repo.refs else None
            blobs = {path: Blob(content, _is_large(path, len(content))) for path, content in files.items()}
            self.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.lfs}
            kept = {**before.files, **blobs} if before else blobs
            return repo.commit("main", kept, title, parent=before.sha if before else None)

    def asked(self, pattern: str) -> list[Request]:
        """The requests so far whose text ("hub GET /api/...") matches."""
        return [request for request in self.requests if re.search(pattern, str(request))]

    # --- what the handlers ask ----------------------------------------------------------------------------------------

    def readable(self, repo_id: str, user: str | None, *, files: bool = False) -> Repo:
        """A repo that a user may look at, or whose files they may read.

        Raises:
            RefusedError: there is none, as far as this user may know.
        """
        repo = self.repos.get(repo_id)
        may = repo is not None and (user == repo.owner or user in repo.readers)
        if repo is None or (repo.private and not may):
            # without a token one is not told whether it exists
            raise RefusedError(404 if user else 401, "RepoNotFound", "Repository not found")
        if files and repo.gated and not may:
            how = "You need to request access." if user else "You must be authenticated to access it."
            raise RefusedError(403 if user else 401, "GatedRepo", f"Access to model {repo_id} is restricted. {how}")
        return repo

    def writable(self, repo_id: str, user: str | None, *, pull_request: bool = False) -> Repo:
        """A repo that a user may commit to, or open a pull request on.

        Raises:
            RefusedError: they may not.
        """
        repo = self.readable(repo_id, user)
        if user is None:
            raise RefusedError(401, None, "Invalid username or password.")
        if user != repo.owner and not pull_request:
            raise RefusedError(403, None, "You don't have the rights to write to this repo")
        return repo


class _Server(ThreadingHTTPServer):
    """A server whose connections end with it, also those that a client keeps open."""

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler], hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.hub = hub
        self._connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _serve(handler: type[BaseHTTPRequestHandler], hub: HubServer) -> _Server:
    server = _Server(handler, hub)
    # a short poll, so that a stop is not waited for
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


def _is_large(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".bin", ".gguf")) or size > _REGULAR_BYTES


class _Handler(BaseHTTPRequestHandler):
    """Answers by the first route whose method and path match."""

    protocol_version = "HTTP/1.1"
    where: str
    routes: ClassVar[list[tuple[str, str, str]]]  # method, pattern of the path, name of the answering method

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def _answer(self) -> None:
        self.sent = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.where, self.command, self.path, self.sent)
        self.body = self._read_body()
        with self.hub._lock:
            self.hub.requests.append(request)
            if self.where == "hub" and self.hub.on_request is not None:
                self.hub.on_request(request)
            parts = urlsplit(self.path)
            self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            try:
                for method, pattern, name in self.routes:
                    if method == self.command and (match := re.fullmatch(pattern, parts.path)):
                        found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        getattr(self, name)(**found)
                        return
                raise RefusedError(404, None, "Sorry, we can't find the page you are looking for.")
            except RefusedError as refused:
                self._json({"error": refused.message}, refused.status, **refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def _read_body(self) -> bytes:
        if self.sent.get("transfer-encoding") != "chunked":
            return self.rfile.read(int(self.sent.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, content: bytes, status: int = 200, **headers: str) -> None:
        """An answer; of a whole file only the range that was asked for."""
        if status == 200 and "Accept-Ranges" in headers and (asked := self.sent.get("range")):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
            if start >= len(content):
                self._send(b"", 416, **{"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, **{"Content-Type": "application/json; charset=utf-8", **headers})

    def log_message(self, *_: object) -> None:
        """The requests are in `HubServer.requests`."""


class _StorageHandler(_Handler):
    """Where large files lie: content by its SHA-256, at addresses that need no token."""

    where = "storage"
    routes: ClassVar = [
        ("GET", r"/objects/(?P<oid>\w+)", "download"),
        ("HEAD", r"/objects/(?P<oid>\w+)", "download"),
        ("PUT", r"/objects/(?P<oid>\w+)", "upload"),
        ("PUT", r"/parts/(?P<oid>\w+)/(?P<number>\d+)", "upload_part"),
        ("GET", r"/v1/chunks/.*", "known_chunk"),
        ("POST", r"/v1/xorbs/default/(?P<name>\w+)", "upload_xorb"),
        ("POST", r"/v1/shards", "upload_shard"),
        ("GET", r"/v1/reconstructions/(?P<name>\w+)", "reconstruction"),
        ("GET", r"/xorbs/(?P<name>\w+)", "download_xorb"),
    ]

    def download(self, oid: str) -> None:
        if oid not in self.hub.objects:
            raise RefusedError(403, None, "Access denied")
        self._send(self.hub.objects[oid], **{"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusedError(400, None, "The content does not match its checksum")
        self.hub.objects[oid] = self.body
        self._send(b"", ETag=f'"{oid}"')

    def upload_part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self._send(b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    # --- Xet ----------------------------------------------------------------------------------------------------------

    def known_chunk(self) -> None:
        raise RefusedError(404, None, "Not tracked")

    def upload_xorb(self, name: str) -> None:
        self.hub.xet.xorbs[name] = self.body
        self._json({"was_inserted": True})

    def upload_shard(self) -> None:
        for oid in self.hub.xet.add_shard(self.body):
            content = self.hub.xet.content(self.hub.xet.hash_of[oid])
            if hashlib.sha256(content).hexdigest() != oid:
                raise RefusedError(400, None, "The content does not match its checksum")
            self.hub.objects[oid] = content
        self._json({"result": 1})

    def reconstruction(self, name: str) -> None:
        if name not in self.hub.xet.files:
            raise RefusedError(404, None, "Not found")
        terms = self.hub.xet.files[name]
        fetch: dict[str, list[dict[str, Any]]] = {}
        for term in terms:
            first, last = self.hub.xet.byte_range(term)
            at = {"range": {"start": term.start, "end": term.end}, "url_range": {"start": first, "end": last}}
            fetch.setdefault(term.xorb, []).append({**at, "url": f"{self.hub.storage}/xorbs/{term.xorb}"})
        listed = [{"hash": t.xorb, "unpacked_length": t.unpacked, "range": {"start": t.start, "end": t.end}} for t in terms]
        self._json({"offset_into_first_range": 0, "terms": listed, "fetch_info": fetch})

    def download_xorb(self, name: str) -> None:
        self._send(self.hub.xet.xorbs[name], **{"Accept-Ranges": "bytes"})


class _HubHandler(_Handler):
    """The Hub's own addresses."""

    where = "hub"
    _API = rf"/api/models/{_REPO}"
    routes: ClassVar = [
        ("GET", "/api/whoami-v2", "whoami"),
        ("POST", "/api/repos/create", "create"),
        ("POST", "/api/validate-yaml", "validate_card"),
        ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", rf"{_API}/branch/(?P<branch>[^/]+)", "branch"),
        ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", "tag"),
        ("POST", rf"{_API}/discussions/(?P<number>\d+)/merge", "merge"),
        ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"{_API}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", "history"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET", rf"{_API}/xet-(?P<scope>read|write)-token/(?P<revision>[^/]+)", "xet_token"),
        ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", "info"),
        ("GET", _API, "info"),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", rf"/{_REPO}\.git/info/lfs/complete", "lfs_complete"),
        ("POST", rf"/{_REPO}\.git/info/lfs/verify", "lfs_verify"),
        *((method, rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve") for method in ("HEAD", "GET")),
        *((method, rf"/api/resolve-cache/models/{_REPO}/(?P<sha>\w+)/(?P<path>.+)", "content") for method in ("HEAD", "GET")),
    ]

    @property
    def user(self) -> str | None:
        return self.hub.user(self.sent)

    # --- accounts and repos -------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            raise RefusedError(401, None, "Invalid username or password.")
        self._json({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked, user = json.loads(self.body), self.user
        if user is None:
            raise RefusedError(401, None, "Invalid username or password.")
        owner = asked.get("organization") or user
        if owner != user:
            raise RefusedError(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self._json({"error": "You already created this model repo", **answer}, 409)
            return
        self.hub.add(repo_id, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.hub.repos[repo_id].private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self._json(answer)

    def branch(self, repo: str, branch: str) -> None:
        found = self.hub.writable(repo, self.user)
        if branch in found.refs:
            raise RefusedError(409, None, "Reference already exists")
        found.refs[branch] = found.at(json.loads(self.body or b"{}").get("startingPoint", "main")).sha
        self._json({})

    def tag(self, repo: str, revision: str) -> None:
        found, name = self.hub.writable(repo, self.user), json.loads(self.body)["tag"]
        if name in found.refs:
            raise RefusedError(409, None, "Tag reference exists already")
        found.refs[f"refs/tags/{name}"] = found.refs[name] = found.at(revision).sha
        self._json({})

    def merge(self, repo: str, number: str) -> None:
        found = self.hub.writable(repo, self.user)
        proposed = found.at(f"refs/pr/{number}")
        found.refs["main"] = proposed.sha
        self._json({"id": proposed.sha, "type": "status-change", "newStatus": "merged"})

    # --- looking ------------------------------------------------------------------------------------------------------

    def info(self, repo: str, revision: str = "main") -> None:
        found = self.hub.readable(repo, self.user)
        commit = found.at(revision)
        siblings = [
            {"rfilename": path, **({"size": len(blob.content), "blobId": blob.oid} if "blobs" in self.query else {})}
            for path, blob in sorted(commit.files.items())
        ]
        about = {"_id": "0" * 24, "id": repo, "modelId": repo, "author": found.owner, "sha": commit.sha, "tags": []}
        state = {"private": found.private, "gated": "manual" if found.gated else False, "disabled": False}
        dates = {"lastModified": _DATE, "createdAt": _DATE}
        self._json({**about, **state, **dates, "downloads": 0, "likes": 0, "siblings": siblings, "spaces": []})

    def refs(self, repo: str) -> None:
        found = self.hub.readable(repo, self.user)

        def those(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
                for ref, sha in found.refs.items()
                if ref.startswith(prefix)
            ]

        tags = {tag["name"] for tag in those("refs/tags/")}
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in found.refs.items()
            if not ref.startswith("refs/") and ref not in tags
        ]
        self._json({"branches": branches, "converts": [], "tags": those("refs/tags/"), "pullRequests": those("refs/pr/")})

    def history(self, repo: str, revision: str) -> None:
        found = self.hub.readable(repo, self.user)
        commits = [
            {"id": c.sha, "title": c.title, "message": c.description, "authors": [{"user": found.owner}], "date": _DATE}
            for c in found.history(revision)
        ]
        self._json(commits)

    def tree(self, repo: str, revision: str) -> None:
        commit = self.hub.readable(repo, self.user).at(revision)
        recursive = self.query.get("recursive", "").lower() in ("1", "true")
        folders = {str(p) for path in commit.files for p in PurePosixPath(path).parents if str(p) != "."}
        entries = [self._entry(commit, path) for path in sorted({*commit.files, *folders}) if recursive or "/" not in path]
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + self.hub.page < len(entries):
            address = f"{self.hub.endpoint}{urlsplit(self.path).path}?recursive={recursive}&cursor={start + self.hub.page}"
            headers["Link"] = f'<{address}>; rel="next"'
        self._json(entries[start : start + self.hub.page], **headers)

    def paths_info(self, repo: str, revision: str) -> None:
        commit = self.hub.readable(repo, self.user).at(revision)
        paths = parse_qs(self.body.decode()).get("paths", [])
        self._json([self._entry(commit, path) for path in paths if path in commit.files])

    def _entry(self, commit: Commit, path: str) -> dict[str, Any]:
        blob = commit.files.get(path)
        if blob is None:
            return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        entry = {"type": "file", "oid": blob.oid, "size": len(blob.content), "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
            if blob.sha256 in self.hub.xet.hash_of:
                entry["xetHash"] = self.hub.xet.hash_of[blob.sha256]
        return entry

    # --- files --------------------------------------------------------------------------------------------------------

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.hub.readable(repo, self.user, files=True)
        commit = found.at(revision)
        seen = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            raise RefusedError(404, "EntryNotFound", "Entry not found", **seen)
        blob = commit.files[path]
        size = str(len(blob.content))
        seen |= {"X-Linked-Size": size, "X-Linked-Etag": f'"{blob.etag}"', "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs and blob.sha256 in self.hub.xet.hash_of:
            seen["X-Xet-Hash"] = self.hub.xet.hash_of[blob.sha256]
            seen["Link"] = f'<{self.hub.endpoint}/api/models/{repo}/xet-read-token/{commit.sha}>; rel="xet-auth"'
        if blob.lfs:
            self._send(b"", 302, **seen, Location=f"{self.hub.storage}/objects/{blob.sha256}")
        else:
            self._send(b"", 307, **seen, Location=f"/api/resolve-cache/models/{repo}/{commit.sha}/{path}")

    def xet_token(self, repo: str, scope: str, revision: str) -> None:
        if scope == "write":
            self.hub.writable(repo, self.user, pull_request="create_pr" in self.query)
        else:
            self.hub.readable(repo, self.user, files=True)
        token, expires = hashlib.sha256(f"{scope} {repo}".encode()).hexdigest(), int(time.time()) + 900
        headers = {"X-Xet-Cas-Url": self.hub.storage, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
        self._json({"casUrl": self.hub.storage, "accessToken": token, "exp": expires}, **headers)

    def content(self, repo: str, sha: str, path: str) -> None:
        blob = self.hub.readable(repo, self.user, files=True).at(sha).files[path]
        self._send(blob.content, **{"X-Repo-Commit": sha, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"})

    # --- commits ------------------------------------------------------------------------------------------------------

    def validate_card(self) -> None:
        errors, warnings = check_card(json.loads(self.body)["content"])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        self._json(answer, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> None:
        found = self.hub.writable(repo, self.user, pull_request="create_pr" in self.query)
        there = found.at(revision).files
        files = []
        for asked in json.loads(self.body)["files"]:
            mode = "lfs" if _is_large(asked["path"], asked["size"]) else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            if asked["path"] in there:
                files[-1]["oid"] = there[asked["path"]].etag
        self._json({"files": files, "commitOid": found.at(revision).sha})

    def lfs_batch(self, repo: str) -> None:
        self.hub.readable(repo, self.user)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            objects.append({"oid": oid, "size": size, "authenticated": True})
            if oid in self.hub.objects:
                continue
            upload: dict[str, Any] = {"href": f"{self.hub.storage}/objects/{oid}"}
            if size > self.hub.part_bytes:
                count = -(-size // self.hub.part_bytes)
                parts = {str(n): f"{self.hub.storage}/parts/{oid}/{n}" for n in range(1, count + 1)}
                upload = {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/complete"}
                upload["header"] = {"chunk_size": str(self.hub.part_bytes), **parts}
            objects[-1]["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.endpoint}/{repo}.git/info/lfs/verify"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_complete(self, repo: str) -> None:
        oid = json.loads(self.body)["oid"]
        content = b"".join(part for _, part in sorted(self.hub.parts.pop(oid).items()))
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusedError(400, None, "The content does not match its checksum")
        self.hub.objects[oid] = content
        self._json({"success": True})

    def lfs_verify(self, repo: str) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise RefusedError(404, None, "Object not found")
        self._json({"message": "ok"})

    def commit(self, repo: str, revision: str) -> None:
        pull_request = "create_pr" in self.query
        found = self.hub.writable(repo, self.user, pull_request=pull_request)
        before = found.at(revision)
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        header, files = lines[0]["value"], dict(before.files)
        if header.get("parentCommit") not in (None, before.sha):
            raise RefusedError(412, None, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            self._apply(line["key"], line["value"], files)
        number = 1 + sum(ref.startswith("refs/pr/") for ref in found.refs)
        ref = f"refs/pr/{number}" if pull_request else revision
        made = found.commit(ref, files, header["summary"], header["description"], before.sha)
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made.sha}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/{number}"
        self._json(answer)

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Blob]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise RefusedError(400, None, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = Blob(self.hub.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusedError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key == "deletedFolder":
            for inside in [p for p in files if p.startswith(path)]:
                del files[inside]
        else:
            raise RefusedError(400, None, f"Unknown operation {key}")


def check_card(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a model card's metadata, by the Hub's documented rules."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"invalid YAML: {error}"], []
    if not isinstance(data, dict):
        return ["metadata must be a mapping"], []
    errors = []
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"(?=.{1,96}$)\w[\w.-]*(/\w[\w.-]*)?", str(base)):
            errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    if data.get("base_model_relation", "adapter") not in ("adapter", "merge", "quantized", "finetune"):
        errors.append('"base_model_relation" must be one of [adapter, merge, quantized, finetune]')
    for key in ("tags", "metrics"):
        values = data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            errors.append(f'"{key}" must be an array of strings')
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    return errors, []


@contextmanager
def pointed_at(hub: HubServer, cache: Any, monkeypatch: Any, *, xet: bool = False) -> Iterator[None]:
    """The client in this process talks to a server, with a cache of its own and no token; large files go by the LFS protocol
    or by Xet."""
    import transformers.utils.hub
    from huggingface_hub import constants, hf_api

    with monkeypatch.context() as patch:
        for name, value in client_settings(hub, cache, xet=xet).items():
            patch.setattr(constants, name, value)
        patch.setattr(hf_api.api, "endpoint", hub.endpoint)
        patch.setattr(transformers.utils.hub, "_hf_api", None)
        patch.delenv("HF_TOKEN", raising=False)
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield


def client_settings(hub: HubServer, cache: Any, *, xet: bool) -> dict[str, Any]:
    """Constants that the client reads from the environment when it is imported."""
    return {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_HOME": hub.endpoint + "/",
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": not xet,
    }
