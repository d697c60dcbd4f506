"""A stand-in for the hub's HTTP interface on this machine: repositories, commits, LFS objects, access.

It implements what huggingface_hub asks of a hub to make a repository, to commit files to it (small ones in the commit,
safetensors through the LFS batch interface) and to find and download them at a revision, with the hub's headers and
error codes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

TOKEN = "hf_stand_in"
_REPO = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: its commits (files by path), its branches and tags, and who may read it."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main", message: str = "") -> str:
        """Add or replace files on a branch, and return the commit."""
        content = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        state = [sorted((path, hashlib.sha1(raw).hexdigest()) for path, raw in content.items()), len(self.commits)]
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        self.commits[sha] = content
        self.refs[branch] = sha
        self.messages.append(message)
        return sha

    def resolved(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubStandIn:
    """The hub: `repos` by name, `requests` as they came (method and path), `lfs` objects by their hash."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = ""
        self.damages: dict[str, bytes] = {}
        """What downloads of a path give instead of its content."""

    @contextmanager
    def serving(self) -> Iterator[HubStandIn]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def hub_for(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[HubStandIn]:
    """Serve a stand-in and lead huggingface_hub to it, with a cache and a token of its own."""
    from huggingface_hub import constants

    with HubStandIn().serving() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(cache),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(cache / "token"),
        }.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing: pytest shows what is printed."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        self.hub.requests.append(f"{method} {path}")
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        for methods, pattern, action in _ROUTES:
            found = re.fullmatch(pattern, path)
            if method in methods and found:
                values = {name: unquote(value) for name, value in found.groupdict().items()}
                return action(self, **values)
        return self._error(404, "EntryNotFound", f"no route {method} {path}")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        content = json.dumps({"error": message}).encode()
        self._send(status, content, {"X-Error-Code": code, "X-Error-Message": message})

    def _readable(self, name: str) -> Repo | None:
        """Return the repository, or answer as the hub does where it is missing or must not be seen."""
        repo = self.hub.repos.get(name)
        if self.token not in ("", TOKEN):
            self._error(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and not self.token):
            self._error(404 if self.token else 401, "RepoNotFound", "Repository not found")
        else:
            return repo
        return None

    def _writable(self, name: str) -> Repo | None:
        if not self.token:
            self._error(401, "", "Invalid username or password.")
            return None
        if name.startswith("other/"):
            self._error(403, "", "You don't have the required permissions to perform this action")
            return None
        return self._readable(name)

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        if not self.token or name.startswith("other/"):
            return self._error(403, "", "You don't have the rights to create a model under this namespace")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=bool(private))
        self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, message="initial commit")
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        block = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(block[1]) if block else {}
        wrong = [key for key in ("license", "pipeline_tag", "library_name") if not isinstance(data.get(key, ""), str)]
        base = data.get("base_model", "a/b")
        if not isinstance(base, str) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
            wrong.append("base_model")
        errors = [{"message": f'"{key}" is not valid'} for key in wrong]
        return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _branch(self, repo: str, branch: str) -> None:
        found = self._writable(repo)
        if found is not None:
            if branch in found.refs:
                return self._error(409, "", "Reference already exists")
            found.refs[branch] = found.refs["main"]
            return self._json({})
        return None

    def _preupload(self, repo: str, revision: str) -> None:
        if self._writable(repo) is not None:
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self._json({"files": files})

    def _batch(self, repo: str) -> None:
        if self._writable(repo) is not None:
            objects = []
            for one in json.loads(self.body)["objects"]:
                href = f"{self.hub.url}/lfs-objects/{one['oid']}"
                actions = {"upload": {"href": href}, "verify": {"href": href}}
                objects.append({**one, **({} if one["oid"] in self.hub.lfs else {"actions": actions})})
            self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "", "the content is not what its hash says")
        self.hub.lfs[oid] = self.body
        return self._send(200)

    def _verify(self, oid: str) -> None:
        asked = json.loads(self.body)
        is_there = oid in self.hub.lfs and len(self.hub.lfs[oid]) == asked["size"]
        self._send(200 if is_there else 404)

    def _commit(self, repo: str, revision: str) -> None:
        found = self._writable(repo)
        if found is None:
            return None
        lines = [json.loads(line) for line in self.body.splitlines()]
        files, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
        sha = found.commit(files, revision, message)
        return self._json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def _info(self, repo: str, revision: str = "main") -> None:
        found = self._readable(repo)
        if found is not None:
            sha = found.resolved(revision)
            if sha is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            files = [{"rfilename": path} for path in found.commits[sha]]
            return self._json({"id": repo, "sha": sha, "private": found.private, "siblings": files})
        return None

    def _tree(self, repo: str, revision: str) -> None:
        found = self._readable(repo)
        if found is not None:
            sha = found.resolved(revision)
            if sha is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return self._json([_entry(path, raw) for path, raw in found.commits[sha].items()])
        return None

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._readable(repo)
        if found is None:
            return None
        sha = found.resolved(revision)
        if sha is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if found.gated:
            return self._error(403, "GatedRepo", f"Access to model {repo} is restricted")
        raw = found.commits[sha].get(path)
        if raw is None:
            return self._error(404, "EntryNotFound", "Entry not found")
        entry = _entry(path, raw)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(raw))}
        return self._send(200, self.hub.damages.get(path, raw), headers)


def _entry(path: str, raw: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(raw)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 128}
    return entry


_ROUTES = [
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), r"/api/validate-yaml", _Handler._validate),
    (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler._branch),
    (("POST",), rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler._preupload),
    (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    (("PUT",), r"/lfs-objects/(?P<oid>[0-9a-f]+)", _Handler._store),
    (("POST",), r"/lfs-objects/(?P<oid>[0-9a-f]+)", _Handler._verify),
    (("POST",), rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler._commit),
    (("GET",), rf"/api/models/{_REPO}", _Handler._info),
    (("GET",), rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler._info),
    (("GET",), rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _Handler._tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
]
