"""A `HubServer` serves directories as model repositories, with the HTTP API of Hugging Face's hub, for tests."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

COMMIT = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567"
TOKEN = "hf_the_token_of_a_member"  # the only token with access to gated repositories


@dataclass(frozen=True)
class HubRepository:
    """A `HubRepository` is a directory that a `HubServer` serves as the only commit, COMMIT, of the branch main.

    - `is_gated`: only a client with TOKEN may read the files
    - `sizes`: for some files, a size to list other than the real size
    """

    path: Path
    is_gated: bool = False
    sizes: tuple[tuple[str, int], ...] = ()

    def tree(self) -> list[dict[str, object]]:
        """Return what the hub lists: path, size and id of every file."""
        files = [file for file in self.path.rglob("*") if file.is_file()]
        sizes = {str(file.relative_to(self.path)): file.stat().st_size for file in files} | dict(self.sizes)
        return [{"type": "file", "path": name, "size": size, "oid": oid(name)} for name, size in sorted(sizes.items())]


def oid(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class HubServer:
    """A `HubServer` listens on a free port of 127.0.0.1 until the body of a `with` ends.

    `requests` lists the method and path of every request so far.
    """

    def __init__(self, repositories: dict[str, HubRepository]) -> None:
        self.requests: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                path = urlsplit(self.path).path
                server.requests.append(f"{self.command} {path}")
                parts = path.removeprefix("/api/models").strip("/").split("/", 4)
                if len(parts) < 4 or (repository := repositories.get("/".join(parts[:2]))) is None:
                    self._refuse(401, "RepoNotFound", "Invalid username or password.")
                elif parts[3] not in ("main", COMMIT):
                    self._refuse(404, "RevisionNotFound", f"Invalid rev id: {parts[3]}")
                elif parts[2] == "revision":
                    self._send(json.dumps({"id": "/".join(parts[:2]), "sha": COMMIT, "siblings": []}).encode())
                elif parts[2] == "tree":
                    self._send(json.dumps(repository.tree()).encode())
                elif repository.is_gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status = 403 if self.headers.get("Authorization") else 401
                    self._refuse(status, "GatedRepo", "Access to the model is restricted.")
                else:
                    self._send_file(repository, parts[4])

            def _send_file(self, repository: HubRepository, name: str) -> None:
                if not (repository.path / name).is_file():
                    self._refuse(404, "EntryNotFound", "Entry not found")
                    return
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(name)}"', "Accept-Ranges": "bytes"}
                size = dict(repository.sizes).get(name) if self.command == "HEAD" else None
                self._send((repository.path / name).read_bytes(), headers, size)

            def _send(self, body: bytes, headers: dict[str, str] | None = None, size: int | None = None) -> None:
                self.send_response(200)
                fields = {
                    "Content-Type": "application/json",
                    "Content-Length": str(len(body) if size is None else size),
                }
                for name, value in {**fields, **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def _refuse(self, status: int, code: str, message: str) -> None:
                self.send_response(status)
                for name, value in (("X-Error-Code", code), ("X-Error-Message", message), ("Content-Length", "0")):
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Write no log, because `requests` has everything."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
