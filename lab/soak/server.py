"""An HTTP server on this machine that fails as servers do, at random but within the patience of a client."""

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

IN_A_ROW = 3  # faults that one path shows before it is served
STATUSES = ("500", "503", "429", "425", "408")
BODIES = {
    "a body cut short": lambda body: body[: len(body) // 2],
    "a body cut short, its length untold": lambda body: body[: len(body) // 2],
    "a page instead of the tar": lambda body: b"<html>Please log in.</html>",
    "no body": lambda body: b"",
}
WORDLESS = {"no answer": b"", "an answer that is not HTTP": b"\x00\xff not a status line\r\n\r\n"}
SLOW = "slow, but whole"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args, faults: Counter, chance: random.Random, rows: Counter, **options) -> None:
        self.faults, self.chance, self.rows = faults, chance, rows
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if self.rows[self.path] >= IN_A_ROW or self.chance.random() < 0.3:
            self.rows[self.path] = 0
            return super().do_GET()
        self.rows[self.path] += 1
        kind = self.chance.choice([*STATUSES, *BODIES, *WORDLESS, SLOW])
        self.faults[kind] += 1
        if kind in STATUSES:
            self.send_response(int(kind))
            self.send_header("Retry-After", "0")
            return self.end_headers()
        if kind in WORDLESS:
            self.wfile.write(WORDLESS[kind])
            return self.connection.close()
        body = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(200)
        if "untold" not in kind:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == SLOW:
            for start in range(0, len(body), 1 << 18):
                self.wfile.write(body[start : start + (1 << 18)])
                time.sleep(0.2)
        else:
            self.wfile.write(BODIES[kind](body))

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the client, or a fault above, has closed the connection
            super().handle()

    def log_message(self, *args) -> None:
        pass


@contextmanager
def faulty_server(folder: Path, seed: int) -> Iterator[tuple[str, Counter]]:
    """Serve `folder` while the block runs: its URL, and how often it failed in which way."""
    faults: Counter = Counter()
    handler = partial(_Handler, directory=str(folder), faults=faults, chance=random.Random(seed), rows=Counter())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", faults
        server.shutdown()
