"""A local file server that can fail in several ways."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Loopback:
    """State of the server."""

    files: dict[str, bytes] = field(default_factory=dict)  # content by path
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # path and Range header of each request
    ranges: bool = True  # whether Range is supported
    tags: bool = True  # whether responses have an ETag
    lengths: bool = True  # whether responses have a Content-Length
    missing: int = 0  # bytes that Content-Length announces and the server does not have
    dies_after: list[int] = field(default_factory=list)  # bytes before a response breaks off, one per request
    status: list[int] = field(default_factory=list)  # error status of a response, one per request
    waits: float = 0.0  # seconds to wait after each 64 KiB
    headers: dict[str, str] = field(default_factory=dict)  # further headers of every response
    redirect: str = ""  # address that responses refer to
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path, wanted = request.path.lstrip("/"), request.headers.get("Range")
        self.requests.append((path, wanted))
        if self.status or path not in self.files:
            request.send_response(self.status.pop(0) if self.status else 404)
            self._end_headers(request)
            return
        content = self.files[path]
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        start = 0
        if wanted and self.ranges and request.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(content)}")
                self._end_headers(request)
                return
        request.send_response(302 if self.redirect else 206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.tags:
            request.send_header("ETag", tag)
        if self.lengths:
            request.send_header("Content-Length", str(len(content) - start + self.missing))
        if self.redirect:
            request.send_header("Location", self.redirect)
        self._end_headers(request)
        self._send(request, content[start:])

    def _end_headers(self, request: BaseHTTPRequestHandler) -> None:
        for name, value in self.headers.items():
            request.send_header(name, value)
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        if self.dies_after:
            content = content[: self.dies_after.pop(0)]
        for at in range(0, len(content), 1 << 16):
            request.wfile.write(content[at : at + (1 << 16)])
            request.wfile.flush()
            if self.waits:
                time.sleep(self.waits)
        request.close_connection = True


class _Server(ThreadingHTTPServer):
    def handle_error(self, *arguments) -> None:
        pass  # the client is gone


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Answer requests on this machine, without a log. Yields the address of the server."""
    handler.log_message = lambda *_: None
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def loopback() -> Iterator[Loopback]:
    state = Loopback()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the client may be gone
                state.answer(self)

    with serving(Handler) as state.url:
        yield state
