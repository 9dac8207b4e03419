"""A Hugging Face hub on this machine: what huggingface_hub asks of the real one, and plain files with ranges."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LFS_SUFFIXES = (".safetensors", ".bin", ".onnx")


@dataclass
class FakeHub:
    """Its content may be changed while it runs."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    plain: dict[str, bytes] = field(default_factory=dict)  # path -> file at a plain URL
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)  # path -> status and X-Error-Code, instead of content
    cut_once: dict[str, int] = field(default_factory=dict)  # path -> bytes after which the connection is closed, one time
    sizes: dict[str, int] = field(default_factory=dict)  # file -> size that is stated of it, instead of the true one
    log: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range

    def downloads(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return sorted(path.rpartition("/")[2] for method, path, _ in self.log if method == "GET" and "/api/" not in path)

    def entries(self, repository: str) -> list[dict[str, object]]:
        """Its files, as both listings of the API need them."""
        entries: list[dict[str, object]] = []
        for name, content in self.repositories[repository].items():
            size, blob = self.sizes.get(name, len(content)), hashlib.sha1(f"blob {len(content)}\0".encode() + content)
            entry: dict[str, object] = {"rfilename": name, "path": name, "type": "file", "size": size}
            entry |= {"blobId": blob.hexdigest(), "oid": blob.hexdigest()}
            if name.endswith(LFS_SUFFIXES):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}
            entries.append(entry)
        return entries


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((self.command, path, self.headers.get("Range", "")))
            if path in hub.answers:
                status, code = hub.answers[path]
                self.send(status, b"", {"X-Error-Code": code} if code else {})
            elif path.startswith("/api/models/"):
                self.answer_api(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                repository, _, rest = path[1:].partition("/resolve/")
                content = hub.repositories[repository][rest.partition("/")[2]]
                digest = hashlib.sha256(content).hexdigest()
                self.send_file(path, content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
            elif path in hub.plain:
                self.send_file(path, hub.plain[path], {})
            else:
                self.send(404, b"", {})

        def answer_api(self, path: str) -> None:
            repository = "/".join(path.split("/")[:2])
            if repository not in hub.repositories:
                self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif "/tree/" in path:
                self.send(200, json.dumps(hub.entries(repository)).encode(), {"Content-Type": "application/json"})
            else:
                info = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": hub.entries(repository)}
                self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

        def send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            ranges = {"Accept-Ranges": "bytes"}
            if start:
                ranges["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(206 if start else 200, content[start:], headers | ranges, cut=hub.cut_once.get(path))
            if self.command == "GET":
                hub.cut_once.pop(path, None)

        def send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:cut])
                self.close_connection = self.close_connection or cut is not None

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
