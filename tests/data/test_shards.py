import gzip
import http.server
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, open_corpus, shards
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.shards import expand
from m3ae_fast.errors import UserError
from tests.helpers.shards import members, write_tar


@pytest.fixture
def server(tmp_path):
    """(url, Counter of requested paths) of a folder on the local host."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests[self.path] += 1
            if self.path.startswith("/short"):  # promises more than it sends
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b"x" * 1000)
            elif self.path.startswith("/flaky") and requests[self.path] == 1:
                self.send_error(503)
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder, requests
        httpd.shutdown()


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)


def samples(url, store):
    return open_corpus([SourceConfig(shards=url)], store).samples


def test_expand(tmp_path):
    for i in range(3):
        (tmp_path / f"s-{i}.tar").write_bytes(b"")
        (tmp_path / f"s-{i}.tar.index").write_bytes(b"")
    every = [str(tmp_path / f"s-{i}.tar") for i in range(3)]
    assert expand(str(tmp_path / "s-{0..2}.tar")) == every
    assert expand(str(tmp_path / "s-*.tar")) == expand(str(tmp_path / "s-*")) == every  # without the sidecars
    assert expand([f"file:{every[0]}", f"file://{every[1]}"]) == every[:2]
    assert expand("::".join(every[1:])) == every[1:]
    assert expand("https://host/x-{00..02}.tar") == [f"https://host/x-0{i}.tar" for i in range(3)]
    assert expand("pipe:cat /a/{0..1}*.tar") == ["pipe:cat /a/0*.tar", "pipe:cat /a/1*.tar"]
    odd = tmp_path / "odd[1].tar"
    odd.write_bytes(b"")
    assert expand(str(odd)) == [str(odd)]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{tmp}/none-*.tar", "matches no file"),
        ("{tmp}/none.tar", "no such file"),
        ("{tmp}", "is a folder"),
        ([], "matches nothing"),
        ("${{NOT_SET_ANYWHERE}}/a.tar", "not a valid pattern"),
        ("{tmp}/{{0..99999}}-{{000..999}}.tar", "more than 10,000,000 names"),
        ("{tmp}/*.odd", "the name is not UTF-8"),
    ],
)
def test_expand_errors(tmp_path, pattern, message):
    (tmp_path / "\udcff.odd").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        expand(pattern.format(tmp=tmp_path) if pattern else pattern)


def test_http(server, store):
    url, folder, requests = server
    for i in range(2):
        write_tar(folder / f"{i}.tar", members(range(3 + i)))
    assert samples(url + "/{0..1}.tar", store) == 7
    assert samples(url + "/{0..1}.tar", ShardStore(store.cache_dir)) == 7
    assert requests == {"/0.tar": 1, "/1.tar": 1}


def test_http_errors(server, store, no_waiting):
    url, folder, requests = server
    write_tar(folder / "flaky.tar", members(range(3)))
    assert samples(url + "/flaky.tar", store) == 3
    for path, tries in (("/missing.tar", 1), ("/short.tar", 3)):
        with pytest.raises(UserError, match=f"shard {url}{path}: cannot be read"):
            samples(url + path, store)
        assert requests[path] == tries
    assert not list((store.cache_dir / "shards").glob("partial-*"))


def test_pipe(tmp_path, store, no_waiting):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    assert samples(f"pipe:cat {path}", store) == 3
    for command in ("pipe:false", "pipe:true", f"pipe:cat {path}; exit 3"):
        with pytest.raises(UserError, match="cannot be read"):
            samples(command, store)
    with pytest.raises(UserError, match="no gopen handler"):
        samples("nosuchscheme://bucket/a.tar", store)


def test_s3_goes_through_the_aws_tool(tmp_path, store, monkeypatch):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    tool = tmp_path / "aws"
    tool.write_text(f'#!/bin/sh\n[ "$*" = "s3 cp s3://bucket/it\'s.tar -" ] && cat {path}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert samples("s3://bucket/it's.tar", store) == 3


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_gzip(tmp_path, server, store, name):
    plain = Path(write_tar(tmp_path / "a.tar", members(range(3)))).read_bytes()
    for folder in (tmp_path, server[1]):
        (folder / name).write_bytes(gzip.compress(plain))
    assert samples(str(tmp_path / name), store) == 3
    assert samples(f"{server[0]}/{name}", store) == 3
    assert samples(f"pipe:cat {tmp_path / name}", store) == 3
    larger = Path(write_tar(tmp_path / "a.tar", members(range(5)))).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(larger))
    assert samples(str(tmp_path / name), store) == 5
    (tmp_path / name).write_bytes(gzip.compress(plain)[:-300])
    with pytest.raises(UserError, match="cannot be read"):
        samples(str(tmp_path / name), store)


def _open(url, cache_dir, barrier, results):
    barrier.wait()
    results.put(samples(url, ShardStore(cache_dir)))


def test_many_processes_fetch_once(server, store):
    url, folder, requests = server
    for i in range(3):
        write_tar(folder / f"{i}.tar", members(range(3)))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    arguments = (url + "/{0..2}.tar", store.cache_dir, barrier, results)
    processes = [context.Process(target=_open, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=30) for _ in processes] == [9] * 4
    for process in processes:
        process.join()
    assert set(requests.values()) == {1}


def test_copies_used_longest_ago_make_room(server, store, monkeypatch):
    url, folder, requests = server
    urls = [f"{url}/{i}.tar" for i in range(4)]
    for i in range(4):
        write_tar(folder / f"{i}.tar", members(range(3)))
    copies = store.cache_dir / "shards"

    def usage(path):  # a disk for two shards
        return shutil._ntuple_diskusage(100, 0, 0 if len(os.listdir(copies)) > 2 else 50)

    monkeypatch.setattr(shards.shutil, "disk_usage", usage)
    assert [index_shards([url], store)[0].summary.samples for url in urls] == [3] * 4
    assert len(os.listdir(copies)) <= 2
    kept = store.path(urls[0])
    store.path(urls[1])
    os.utime(kept, (2**31, 2**31))  # in the future: the clock's ticks are coarse
    store.path(urls[2])
    assert kept.exists()
    before = requests.copy()
    assert len(index_shards(urls, store)[3].table()) == 3  # the index outlives the copy
    assert requests == before


def test_abandoned_copies_are_removed(server, store, monkeypatch):
    url, folder, _ = server
    write_tar(folder / "0.tar", members(range(3)))
    old, young = (store.cache_dir / "shards" / f"partial-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (0, 0))
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    assert store.path(url + "/0.tar").exists()
    assert (old.exists(), young.exists()) == (False, True)


def test_fetch_ahead(server, store):
    url, folder, requests = server
    write_tar(folder / "0.tar", members(range(3)))
    with store.lock(store.name(url + "/0.tar")):  # someone else is at it
        store.fetch_ahead([url + "/0.tar"])
    assert not requests
    store.fetch_ahead([url + "/missing.tar", url + "/0.tar"])
    assert requests["/0.tar"] == 1
    assert store.path(url + "/0.tar").exists()
    assert requests["/0.tar"] == 1


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        ShardStore(tmp_path / "file" / "cache")
