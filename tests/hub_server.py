"""A stand-in for the Hugging Face hub: the few requests of its API that huggingface_hub makes, on a local port."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """repos: name -> folder with its files. What happens is in `requests`: (method, path, Range header).

    gated: repositories that show their list to all and their files to none; cut_after: bytes of a body after which the
    connection breaks, once for each file; fail_with: a status for everything.
    """

    repos: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    cut_after: int | None = None
    fail_with: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    url: str = ""

    def asked_for(self, method: str, pattern: str) -> list[str]:
        return [path for m, path, _ in self.requests if m == method and re.search(pattern, path)]


@contextmanager
def serving(repos: dict[str, Path]) -> Iterator[Hub]:
    hub = Hub(repos)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def revision_of(folder: Path) -> str:
    listing = [f"{p.relative_to(folder)} {p.stat().st_size}" for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha1("\n".join(listing).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.fail_with:
            return self.send(self.hub.fail_with)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self.send_info(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            return self.send_tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file(match[1], match[2])
        return self.send(404)

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def folder(self, repo: str) -> Path | None:
        if repo not in self.hub.repos:
            self.send(401, X_Error_Code="RepoNotFound")  # as the hub does for what is private
            return None
        return self.hub.repos[repo]

    def send_info(self, repo: str) -> None:
        if (folder := self.folder(repo)) is None:
            return
        files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
        info = {
            "id": repo,
            "sha": revision_of(folder),
            "siblings": [{"rfilename": p.relative_to(folder).as_posix(), "size": p.stat().st_size} for p in files],
        }
        self.send(200, json.dumps(info).encode(), Content_Type="application/json")

    def send_tree(self, repo: str, below: str) -> None:
        if (folder := self.folder(repo)) is None:
            return
        files = [p for p in sorted((folder / below).rglob("*")) if p.is_file()]
        entries = [
            {"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size, "oid": _etag(p)}
            for p in files
        ]
        self.send(200, json.dumps(entries).encode(), Content_Type="application/json")

    def send_file(self, repo: str, name: str) -> None:
        if (folder := self.folder(repo)) is None:
            return
        if repo in self.hub.gated:
            return self.send(403, X_Error_Code="GatedRepo")
        path = folder / name
        common = {"X_Repo_Commit": revision_of(folder), "Accept_Ranges": "bytes"}
        if not path.is_file():
            return self.send(404, X_Error_Code="EntryNotFound", **common)
        data = path.read_bytes()
        common["ETag"] = f'"{_etag(path)}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start = int(wanted[1]) if wanted else 0
        end = min(int(wanted[2]) + 1, len(data)) if wanted and wanted[2] else len(data)
        if wanted:
            common["Content_Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        body = data[start:end]
        cut = self.hub.cut_after
        if self.command == "GET" and cut is not None and len(body) > cut and name not in self.hub.cut:
            self.hub.cut.add(name)
            self.close_connection = True
            return self.send(200, body[:cut], Content_Length=str(len(body)), **common)
        return self.send(206 if wanted else 200, body, Content_Length=str(len(body)), **common)


def _etag(path: Path) -> str:
    return hashlib.sha1(str(path.stat().st_size).encode() + path.name.encode()).hexdigest()
