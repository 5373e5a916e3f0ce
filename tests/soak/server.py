"""A local HTTP server with random failures that a patient client tolerates."""

from __future__ import annotations

import contextlib
import http.server
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

IN_A_ROW = 3  # maximum number of consecutive failures for a path
STATUSES = ("500", "503", "429", "425", "408")
BODIES = {
    "a truncated body": lambda body: body[: len(body) // 2],
    "a truncated body without a length": lambda body: body[: len(body) // 2],
    "an HTML page instead of the tar": lambda body: b"<html>Please log in.</html>",
    "no body": lambda body: b"",
}
WORDLESS = {"no response": b"", "a response that is not HTTP": b"\x00\xff not a status line\r\n\r\n"}
SLOW = "slow but complete"


class Server(NamedTuple):
    """A running server: its address, its number of failures by kind, and the number of complete responses by path."""

    url: str
    failures: Counter[str]
    served: Counter[str]


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(
        self, *args, counts: Server, share: float, latency: float, chance: random.Random, rows: Counter, **options
    ) -> None:
        self.counts, self.share, self.latency, self.chance, self.rows = counts, share, latency, chance, rows
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        time.sleep(self.latency)
        if self.rows[self.path] >= IN_A_ROW or self.chance.random() >= self.share:
            self.rows[self.path] = 0
            self.counts.served[self.path] += 1
            return super().do_GET()
        self.rows[self.path] += 1
        kind = self.chance.choice([*STATUSES, *BODIES, *WORDLESS, SLOW])
        self.counts.failures[kind] += 1
        self.counts.served[self.path] += kind == SLOW
        if kind in STATUSES:
            self.send_response(int(kind))
            self.send_header("Retry-After", "0")
            return self.end_headers()
        if kind in WORDLESS:
            self.wfile.write(WORDLESS[kind])
            return self.connection.close()
        body = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        if "without a length" not in kind:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == SLOW:
            for start in range(0, len(body), 1 << 18):
                self.wfile.write(body[start : start + (1 << 18)])
                time.sleep(0.2)
        else:
            self.wfile.write(BODIES[kind](body))

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client or an injected fault has closed the connection
            super().handle()

    def log_message(self, *args) -> None:
        pass


@contextmanager
def faulty_server(folder: Path, seed: int, share: float = 0.7, latency: float = 0.0) -> Iterator[Server]:
    """Serve a folder for the duration of a context, and yield the server.

    Args:
        folder: the folder.
        seed: random seed of the failures.
        share: probability that a request fails, unless the last IN_A_ROW requests for the path have failed.
        latency: delay of each response in seconds.
    """
    counts = Server("", Counter(), Counter())
    options = {"counts": counts, "share": share, "latency": latency, "chance": random.Random(seed), "rows": Counter()}
    handler = partial(_Handler, directory=str(folder), **options)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield counts._replace(url=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
