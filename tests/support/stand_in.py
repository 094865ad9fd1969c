"""A local HTTP server that answers as a file server and as the Hugging Face hub do.

    with serve(files={"/data/train.json": b"..."}, repositories={"datasets/me/mine": {...}}) as web:
        urlopen(f"{web.url}/data/train.json")
        subprocess.run(..., env={"HF_ENDPOINT": web.url})

A repository is a dictionary from the names of its files to their contents; a model's has no prefix.
Uploads arrive in it as the hub takes them: small files in a commit, weights (LFS) before it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4
Files = MutableMapping[str, bytes]
LFS = (".safetensors", ".bin")


@dataclass
class Web:
    """What is served, where, and what was asked for.

    Attributes:
        url: the address of the server.
        files: contents by path.
        repositories: files of the hub, by repository.
        broken: paths whose answers end half way.
        asked: each request so far, such as ``GET /data/train.json``.
        uploaded: weights that were uploaded and not yet committed, by digest.
        token: what uploads must be authorised with.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    repositories: dict[str, Files] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    uploaded: dict[str, bytes] = field(default_factory=dict)
    token: str = "hf_of_the_stand_in"


@contextmanager
def serve(
    files: Mapping[str, bytes] | None = None, repositories: Mapping[str, Files] | None = None
) -> Iterator[Web]:
    """Serve on a free port of this machine until the block ends."""
    web = Web(files=dict(files or {}), repositories=dict(repositories or {}))
    handler = type("Handler", (_Handler,), {"web": web})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    web.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    web: Web

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        """Weights, at the address that ``_batch`` has given."""
        data = self._body()
        digest = urlsplit(self.path).path.removeprefix("/lfs/")
        assert hashlib.sha256(data).hexdigest() == digest
        self.web.uploaded[digest] = data
        self._send("")

    def do_POST(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self._body()
        self.web.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {self.web.token}":
            self._refuse(401, "you may not write here")
        elif path == "/api/validate-yaml":
            self._send(json.dumps({"warnings": [], "errors": []}))
        elif path == "/api/repos/create":
            about = json.loads(data)
            name = f"{about.get('organization') or 'me'}/{about['name']}"
            self.web.repositories.setdefault(name, {})
            self._send(json.dumps({"url": f"{self.web.url}/{name}", "name": name}))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(data))
        elif "/preupload/" in path:
            files = [f["path"] for f in json.loads(data)["files"]]
            mode = {f: "lfs" if f.endswith(LFS) else "regular" for f in files}
            told = [{"path": f, "uploadMode": mode[f], "shouldIgnore": False} for f in files]
            self._send(json.dumps({"files": told}))
        else:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], data)

    def _batch(self, asked: dict[str, Any]) -> None:
        """Where to upload weights to."""
        told = [
            {**o, "actions": {"upload": {"href": f"{self.web.url}/lfs/{o['oid']}"}}}
            for o in asked["objects"]
        ]
        self._send(json.dumps({"transfer": "basic", "objects": told}))

    def _commit(self, repository: str, data: bytes) -> None:
        """Change the files of a repository as a commit says, line by line."""
        files = self.web.repositories[repository]
        for line in data.decode().splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.web.uploaded[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        url = f"{self.web.url}/{repository}/commit/{COMMIT}"
        self._send(json.dumps({"success": True, "commitOid": COMMIT, "commitUrl": url}))

    def _body(self) -> bytes:
        """The body of a request, which may come in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing; ``Web.asked`` has it."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.web.asked.append(f"{self.command} {path}")
        if path in self.web.files:
            self._send(self.web.files[path], cut=path in self.web.broken)
        elif path.startswith("/api/"):
            self._about(path.removeprefix("/api/"))
        else:
            self._file(path.removeprefix("/"))

    def _about(self, path: str) -> None:
        """The hub's description of ``{models,datasets}/OWNER/NAME``, or of a folder in it."""
        kind, owner, name, *more = [*path.split("/"), "", "", "", ""]
        name = f"{owner}/{name}"
        found = self.web.repositories.get(f"datasets/{name}" if kind == "datasets" else name)
        if found is None:
            self._missing("RepoNotFound")
        elif more[0] == "tree":
            folder = "/".join(more[2:]).strip("/")
            self._send(json.dumps(_tree(found, folder, "recursive=true" in self.path.lower())))
        else:
            siblings = [{"rfilename": file, "size": len(data)} for file, data in found.items()]
            about = {"id": name, "sha": COMMIT, "private": False, "tags": []}
            self._send(json.dumps({**about, "siblings": siblings, "downloads": 0, "likes": 0}))

    def _file(self, path: str) -> None:
        """A file of a repository: ``[datasets/]OWNER/NAME/resolve/REVISION/FILE``."""
        repository, _, rest = path.partition("/resolve/")
        files = self.web.repositories.get(repository)
        content = (files or {}).get(rest.partition("/")[2])
        if content is None:
            self._missing("RepoNotFound" if files is None else "EntryNotFound")
        else:
            self._send(content, etag=hashlib.sha256(content).hexdigest())

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _refuse(self, code: int, why: str) -> None:
        data = json.dumps({"error": why}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _send(self, content: bytes | str, etag: str = "", cut: bool = False) -> None:
        data = content.encode() if isinstance(content, str) else content
        whole = len(data)
        wanted = self.headers.get("Range", "")
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = (
            (int(first), min(int(last or whole - 1), whole - 1)) if wanted else (0, whole - 1)
        )
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start + 1))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{whole}")
        if etag:
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[start : end + 1][: whole // 2 if cut else None])


def _tree(files: Files, folder: str, whole: bool) -> list[dict[str, Any]]:
    """The hub's list of the files and folders below a folder."""
    found: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        about = {"oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
        parts = path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            found.setdefault(parent, {"type": "directory", "path": parent, **about})
        found[path] = {"type": "file", "path": path, **about}
    depth = folder.count("/") + 1 if folder else 0
    return [
        entry
        for path, entry in found.items()
        if path != folder and (whole or path.count("/") == depth) and path.startswith(folder)
    ]
