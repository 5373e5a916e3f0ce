"""`hub_answers` with a hub that responds, is silent or does not exist. Its answer decides whether a name means a model
on the Hub."""

import functools
import http.server
import socket
import threading

import huggingface_hub
import pytest

from m3ae_fast.base import hub
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.hub import find_folder
from m3ae_fast.batch.tokenizer import load_tokenizer
from m3ae_fast.shards.options import SourceOptions
from m3ae_fast.shards.sources.huggingface import HuggingFace


class _HubHandler(http.server.BaseHTTPRequestHandler):
    """A hub that contains only owner/name."""

    def do_GET(self):
        known = self.path.split("?")[0] in ("/api/models/owner/name", "/api/datasets/owner/name")
        content = b'{"id": "owner/name"}' if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub_at_port(monkeypatch):
    """Return a function that sets the port at which the Hub is expected on this machine."""

    def set_port(port):
        api = functools.partial(huggingface_hub.HfApi, endpoint=f"http://127.0.0.1:{port}")
        monkeypatch.setattr(huggingface_hub, "HfApi", api)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return set_port


def test_any_response_shows_that_the_hub_is_reachable(hub_at_port):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _HubHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub_at_port(server.server_port)
        assert hub.hub_answers("owner/name") and hub.hub_answers("owner/name", "dataset")
        assert hub.hub_answers("owner/other") and hub.hub_answers("no -- name")
        server.shutdown()


def test_a_hub_that_does_not_respond_times_out(hub_at_port, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub_at_port(silent.getsockname()[1])
        monkeypatch.setattr(hub, "PATIENCE", 0.1)
        assert not hub.hub_answers("owner/name")
    monkeypatch.setattr(hub, "PATIENCE", 60)
    assert not hub.hub_answers("owner/name")  # refused, because no process listens any more


@pytest.mark.slow
def test_a_hub_that_timed_out_is_not_contacted_again(hub_at_port, monkeypatch, tmp_path):
    """A name without a local copy gives an error, and the library does not retry."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", lambda *_, **__: pytest.fail("asks"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub_at_port(silent.getsockname()[1])
        monkeypatch.setattr(hub, "PATIENCE", 0.1)
        with pytest.raises(UserError, match="owner/name: no such file or folder, and the Hub does not respond, and"):
            find_folder("owner/name")
        with pytest.raises(UserError, match="owner/name: is neither a file nor available from the Hugging Face Hub"):
            load_tokenizer("owner/name", 8)
        with pytest.raises(UserError, match=r"owner/name: cannot be loaded \(it is not a folder, and the"):
            HuggingFace("owner/name", SourceOptions())
