import contextlib
import fcntl
import gzip
import http.server
import multiprocessing
import os
import shutil
import socket
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, download, open_corpus, shard_store
from m3ae_fast.data.index import index_shards
from m3ae_fast.data.reader import Reader
from m3ae_fast.data.shard_names import expand
from m3ae_fast.process.workers import allow_open_files
from tests.helpers.shards import members, picture, write_tar


@pytest.fixture
def server(tmp_path):
    """Return (url, served folder, Counter of requested paths) of a server on the local host. The query after `?` in a
    path names a fault. If the name ends with `-once`, only the first request has the fault."""
    folder = tmp_path / "served"
    folder.mkdir()
    requests = Counter()
    ended = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            requests[self.path] += 1
            path, _, fault = self.path.partition("?")
            if fault.endswith("-once") and requests[self.path] > 1:
                return super().do_GET()
            fault = fault.removesuffix("-once")
            if fault.isdigit():
                self.send_response(int(fault))
                self.send_header("Retry-After", "7" if fault == "429" else "Wed, 21 Oct 2015 07:28:00 GMT")
                return self.end_headers()
            if not fault:
                return super().do_GET()
            whole = (folder / path[1:]).read_bytes()
            self.send_response(200)
            if fault == "short":  # announces more bytes than it sends
                self.send_header("Content-Length", str(len(whole)))
            self.end_headers()
            if fault in ("short", "cut"):
                self.wfile.write(whole[:-2000])
            elif fault == "html":
                self.wfile.write(b"<!DOCTYPE html><html><body>Please log in.</body></html>")
            elif fault == "silent":
                ended.wait(20)
            elif fault == "trickle":
                for i in range(len(whole)):
                    self.wfile.write(whole[i : i + 1])
                    if ended.wait(0.02):
                        break

        def log_message(self, *args):
            pass

        def handle(self):
            with contextlib.suppress(ConnectionError):  # the client has closed the connection
                super().handle()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder, requests
        ended.set()
        httpd.shutdown()


@pytest.fixture
def no_waiting(monkeypatch):
    """Return a list that records the waits between attempts, in seconds, instead of sleeping."""
    waits = []
    monkeypatch.setattr(shard_store.time, "sleep", waits.append)
    return waits


def samples(url, store):
    return open_corpus([SourceConfig(shards=url)], store).samples


def test_brace_and_glob_patterns_are_expanded(tmp_path):
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


@pytest.mark.parametrize("name", ["run[1]", "run{0..2}", "run::1", "r*n?1"])
def test_the_name_of_an_existing_folder_is_not_a_pattern(tmp_path, name):
    for folder in ("run1", "run0", "run", name):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.tar").write_bytes(b"")
    own = [str(tmp_path / name / "a.tar")]
    assert expand(own) == expand(own[0]) == expand(str(tmp_path / name / "*.tar")) == own
    assert expand(f"file://{own[0]}") == own


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("{tmp}/none-*.tar", "matches no file"),
        ("{tmp}/none.tar", "no such file"),
        ("{tmp}", "is a folder; make shards of its images: m3ae-fast shards make"),
        ([], "matches no shards"),
        ("${{NOT_SET_ANYWHERE}}/a.tar", "not a valid pattern"),
        ("{tmp}/{{0..99999}}-{{000..999}}.tar", "more than 10,000,000 names"),
        ("{tmp}/*.odd", "the name is not UTF-8"),
    ],
)
def test_invalid_shard_patterns_are_refused(tmp_path, pattern, message):
    (tmp_path / "\udcff.odd").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        expand(pattern.format(tmp=tmp_path) if pattern else pattern)


def test_shards_are_downloaded_over_http(server, store, no_waiting):
    url, folder, requests = server
    for i in range(2):
        write_tar(folder / f"{i}.tar", members(range(3 + i)))
    assert samples(url + "/{0..1}.tar", store) == 7
    assert samples(url + "/{0..1}.tar", ShardStore(store.cache_dir)) == 7
    assert requests == {"/0.tar": 1, "/1.tar": 1} and not no_waiting


def test_temporary_download_errors_are_retried(server, store, no_waiting):
    url, folder, requests = server
    write_tar(folder / "a.tar", members(range(3)))
    for fault in ("408", "425", "429", "500", "503", "short", "cut", "html"):
        assert samples(f"{url}/a.tar?{fault}-once", store) == 3, fault
        assert requests[f"/a.tar?{fault}-once"] == 2
    assert no_waiting == [1, 1, 7, 1, 1, 1, 1, 1]  # with fault 429, the header Retry-After asks for 7 seconds


@pytest.mark.parametrize(
    ("fault", "tries", "words"),
    [
        ("404", 1, "HTTP Error 404"),
        ("403", 1, "HTTP Error 403"),
        ("429", download.ATTEMPTS, "HTTP Error 429"),
        ("short", download.ATTEMPTS, "ended after .* of .* bytes"),
        ("cut", download.ATTEMPTS, "not a complete tar file"),
        ("html", download.ATTEMPTS, "not a complete tar file.*55 bytes that begin with '<!DOCTYPE html>"),
    ],
)
def test_a_persistent_download_error_is_reported_and_leaves_no_files(server, store, no_waiting, fault, tries, words):
    url, folder, requests = server
    write_tar(folder / "a.tar", members(range(3)))
    with pytest.raises(UserError, match=rf"shard {url}/a.tar\?{fault}: cannot be read .*{words}"):
        samples(f"{url}/a.tar?{fault}", store)
    assert requests[f"/a.tar?{fault}"] == tries
    assert not list((store.cache_dir / "shards").iterdir())


@pytest.mark.parametrize("fault", ["silent", "trickle"])
def test_a_download_that_is_too_slow_is_ended(server, store, no_waiting, monkeypatch, fault):
    for name, value in (("TIMEOUT_S", 0.3), ("SLOW_S", 0.3)):
        monkeypatch.setattr(download, name, value)
    monkeypatch.setattr(shard_store, "ATTEMPTS", 1)
    write_tar(server[1] / "a.tar", members(range(3)))
    with pytest.raises(UserError, match="timed out" if fault == "silent" else "bytes/s is below 4096"):
        samples(f"{server[0]}/a.tar?{fault}", store)


def test_a_download_attempt_has_a_maximum_duration(tmp_path, store, no_waiting, monkeypatch):
    monkeypatch.setattr(download, "LONGEST_S", 0.3)
    monkeypatch.setattr(shard_store, "ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"took more than 0\.3 s"):
        samples("pipe:cat /dev/zero", store)
    monkeypatch.setattr(download, "TIMEOUT_S", 1.0)
    with pytest.raises(UserError, match="no data arrived for 1 s"):
        samples("pipe:echo x; sleep 60", store)


def test_a_blocked_download_does_not_delay_other_shards(server, tmp_path, store, monkeypatch):
    """One run proceeds although the server of another run never responds."""
    monkeypatch.setattr(shard_store, "ATTEMPTS", 1)
    write_tar(server[1] / "a.tar", members(range(3)))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        shard, lost = f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar", []
        index = threading.Thread(target=lambda: index_shards([shard], store, lost=lost), daemon=True)
        index.start()
        connection, _ = silent.accept()
        assert samples(server[0] + "/a.tar", store) == 3
        assert samples(write_tar(tmp_path / "local.tar", members(range(4))), store) == 4
        assert index.is_alive()
        connection.close()
        index.join()  # otherwise, this thread would see the patches of later tests
    assert len(lost) == 1


def test_a_damaged_cached_shard_is_downloaded_once_more(server, store):
    url, folder, requests = server
    write_tar(folder / "a.tar", members(range(3)))
    shard = url + "/a.tar"
    store.copy(shard).write_bytes(b"<html>")
    assert samples(shard, store) == 3 and requests["/a.tar"] == 1
    whole = store.copy(shard).read_bytes()
    store.copy(shard).write_bytes(whole[:3000])
    corpus = open_corpus([SourceConfig(shards=shard)], store)
    assert Reader(corpus.sources[0], store).read(0, 2).image == picture(2)
    assert requests["/a.tar"] == 2
    write_tar(folder / "a.tar", members(range(5)))  # the shard has been replaced
    store.copy(shard).write_bytes(b"")
    with pytest.raises(OSError, match=rf"its cached copy {store.copy(shard)} differs from the indexed shard; delete "):
        Reader(corpus.sources[0], store).read(0, 2)
    assert requests["/a.tar"] == 3


def test_a_cached_shard_with_a_changed_byte_is_downloaded_once_more(server, store, no_waiting):
    url, folder, requests = server
    write_tar(folder / "a.tar", members(range(3)))
    corpus = open_corpus([SourceConfig(shards=url + "/a.tar")], store)
    copy = store.copy(url + "/a.tar")
    whole = copy.read_bytes()

    def damage(part: bytes) -> None:
        at = whole.index(part) + len(part) // 2
        copy.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])

    reader = Reader(corpus.sources[0], store)
    intact = [reader.read(0, row) for row in range(3)]
    for tries, part in ((2, picture(2)), (3, intact[1].caption.encode())):
        damage(part)
        reader = Reader(corpus.sources[0], store)
        assert [reader.read(0, row) for row in range(3)] == intact
        assert requests["/a.tar"] == tries
    damage(picture(2))
    (folder / "a.tar").unlink()
    reader = Reader(corpus.sources[0], store)
    assert [reader.read(0, row) for row in range(2)] == intact[:2]
    for _ in range(3):
        with pytest.raises(OSError, match=r"cannot fetch|differs from the indexed shard"):
            reader.read(0, 2)
    assert requests["/a.tar"] == 4  # only the first attempt requests the shard again
    assert reader.read(0, 1) == intact[1]


def test_a_truncated_caption_of_a_cached_shard_is_not_mistaken_for_damage(server, store, no_waiting):
    url, folder, requests = server
    write_tar(folder / "a.tar", [("0.txt", b"ab" * 50_000)])
    corpus = open_corpus([SourceConfig(shards=url + "/a.tar")], store)
    assert Reader(corpus.sources[0], store).read(0, 0).caption == "ab" * 32_768
    assert requests["/a.tar"] == 1


def test_one_cache_serves_several_users(server, store, monkeypatch):
    """Copies are as readable as the umask allows. Copies of other users are not touched and cause no error."""
    url, folder, requests = server
    write_tar(folder / "a.tar", members(range(3)))
    old = os.umask(0o002)
    try:
        copy = store.path(url + "/a.tar")
        assert copy.stat().st_mode & 0o777 == 0o664
        assert (store.cache_dir / "locks" / copy.name).stat().st_mode & 0o777 == 0o664
        (entry,) = index_shards([url + "/a.tar"], store)
        assert entry.sidecar.stat().st_mode & 0o444 == 0o444
    finally:
        os.umask(old)

    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shard_store.os, "utime", refuse)
    assert store.path(url + "/a.tar") == copy
    opened, real = [], os.open
    monkeypatch.setattr(
        shard_store.os, "open", lambda p, f, *m: refuse(p) if f & os.O_RDWR else opened.append(p) or real(p, f)
    )
    with store.lock(copy.name), pytest.raises(BlockingIOError), store.lock(copy.name, wait=False):
        pass
    assert len(opened) == 2 and requests["/a.tar"] == 1


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_not_accepted_as_a_shard(tmp_path, store, kind):
    path = "/dev/zero"
    if kind == "pipe":
        os.mkfifo(path := str(tmp_path / "a.tar"))
    with pytest.raises(UserError, match="is a pipe or a device"):
        samples(path, store)
    good = write_tar(tmp_path / "good.tar", members(range(3)))
    os.symlink(path, good + ".index")  # a link in place of a sidecar
    assert samples(good, store) == 3


def test_shards_are_read_from_the_output_of_a_command(tmp_path, store, no_waiting):
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    assert samples(f"pipe:cat {path}", store) == 3
    for command in ("pipe:false", "pipe:true", f"pipe:cat {path}; exit 3"):
        with pytest.raises(UserError, match="cannot be read"):
            samples(command, store)
    with pytest.raises(UserError, match="no gopen handler"):
        samples("nosuchscheme://bucket/a.tar", store)


def test_command_output_is_read_while_a_thousand_files_are_open(tmp_path, store):
    """A rank with many sources has so many open files that the system's select() would fail."""
    allow_open_files()
    path = write_tar(tmp_path / "a.tar", members(range(3)))
    with contextlib.ExitStack() as files:
        for _ in range(1100):
            files.enter_context(open(path, "rb"))
        assert samples(f"pipe:cat {path}", store) == 3


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_gzipped_shards_are_read(tmp_path, server, store, name):
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


def test_a_changed_gzipped_shard_of_the_same_length_is_read_again(tmp_path, store):
    path = tmp_path / "a.tar.gz"
    for number, text in enumerate((b"before", b"behind")):
        plain = Path(write_tar(tmp_path / "a.tar", [("0.txt", text)])).read_bytes()
        path.write_bytes(gzip.compress(plain, 0, mtime=0))
        os.utime(path, ns=(number, number))
        corpus = open_corpus([SourceConfig(shards=str(path))], store)
        assert Reader(corpus.sources[0], store).read(0, 0).caption == text.decode()


def _open(url, cache_dir, barrier, results):
    barrier.wait()
    results.put(samples(url, ShardStore(cache_dir)))


def test_many_processes_download_a_shard_once(server, store):
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


def test_least_recently_used_cached_shards_are_evicted(server, store, monkeypatch):
    url, folder, requests = server
    urls = [f"{url}/{i}.tar" for i in range(4)]
    for i in range(4):
        write_tar(folder / f"{i}.tar", members(range(3)))
    copies = store.cache_dir / "shards"

    def usage(path):  # a disk with space for two shards
        return shutil._ntuple_diskusage(100, 0, 0 if len(os.listdir(copies)) > 2 else 50)

    monkeypatch.setattr(shard_store.shutil, "disk_usage", usage)
    assert [index_shards([url], store)[0].summary.samples for url in urls] == [3] * 4
    assert len(os.listdir(copies)) <= 2
    kept = store.path(urls[0])
    store.path(urls[1])
    os.utime(kept, (2**31, 2**31))  # in the future, because the clock of the file system is coarse
    store.path(urls[2])
    assert kept.exists()
    before = requests.copy()
    assert len(index_shards(urls, store)[3].table()) == 3  # the index outlives the copy
    assert requests == before


def test_a_cached_shard_that_is_read_again_is_not_evicted_next(server, tmp_path):
    url, folder, _ = server
    names = [f"{url}/{i}.tar" for i in range(3)]
    for i in range(3):
        write_tar(folder / f"{i}.tar", members(range(3)))
    store = ShardStore(tmp_path / "limited", 2 * (folder / "0.tar").stat().st_size / 1e9)
    for age, name in enumerate(names[:2]):
        os.utime(store.path(name), (age, age))
    store.path(names[0])
    store.path(names[2])
    assert [store.copy(name).exists() for name in names] == [True, False, True]


def test_two_processes_may_evict_shards_at_the_same_time(server, store, monkeypatch, no_waiting):
    url, folder, requests = server
    for i in range(2):
        write_tar(folder / f"{i}.tar", members(range(3)))
    copy = store.path(f"{url}/0.tar")

    def usage(path):  # the disk is full, and another process removes the copy first
        copy.unlink(missing_ok=True)
        return shutil._ntuple_diskusage(100, 100, 0)

    monkeypatch.setattr(shard_store.shutil, "disk_usage", usage)
    assert store.path(f"{url}/1.tar").exists()
    assert requests == {"/0.tar": 1, "/1.tar": 1} and not no_waiting


def test_incomplete_downloads_of_a_killed_process_are_removed(server, store):
    url, folder, _ = server
    write_tar(folder / "0.tar", members(range(3)))
    dead, alive = (store.cache_dir / "shards" / f"partial-{name}" for name in ("dead", "alive"))
    dead.write_bytes(b"")
    with open(alive, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert store.path(url + "/0.tar").exists()
    assert (dead.exists(), alive.exists()) == (False, True)


def test_cached_shards_do_not_exceed_the_limit(server, tmp_path):
    """The limit also holds while copies are written. A copy of unknown size counts as much as the largest copy."""
    url, folder, requests = server
    for i in range(6):
        write_tar(folder / f"{i}.tar", members(range(12 - 9 * (i % 2))))
    size = (folder / "0.tar").stat().st_size
    store = ShardStore(tmp_path / "limited", 3.5 * size / 1e9)
    copies, sizes = store.cache_dir / "shards", []
    names = [f"{url}/{i}.tar" for i in range(6)]
    for name in names:
        store.path(name)
        sizes.append(sum(path.stat().st_size for path in copies.iterdir()))
    assert max(sizes) <= store.limit and store.space().limit == store.limit
    assert sizes[-1] > 2 * size
    for path in map(store.copy, names):
        assert not path.exists() or path.read_bytes() == (folder / path.name[-5:]).read_bytes()
    store.path(f"{url}/5.tar")
    assert requests["/5.tar"] == 1


def serve_equal_shards(url, folder, count=20):
    """Serve shards of equal size, and return their names and the size."""
    tar = Path(write_tar(folder / "0.tar", members(range(3)))).read_bytes()
    for number in range(count):
        (folder / f"{number}.tar").write_bytes(tar)
    return [f"{url}/{number}.tar" for number in range(count)], len(tar)


@pytest.mark.parametrize("limit", [None, 5])
def test_a_download_inspects_few_cached_shards_regardless_of_their_number(server, tmp_path, monkeypatch, limit):
    """The cache has enough space or, with a limit, the oldest copies have to be removed."""
    url, folder, _ = server
    names, size = serve_equal_shards(url, folder)
    store = ShardStore(tmp_path / "cache", limit and (300 + limit) * size / 1e9)
    for age in range(300):
        copy = store.cache_dir / "shards" / f"{age:03d}.tar"
        copy.write_bytes(bytes(size))
        os.utime(copy, (age, age))
    store.path(names[0])  # in this call, the process scans the copies
    monkeypatch.setattr(shard_store, "_SCAN_S", float("inf"))
    calls, stat, scandir, usage = Counter(), Path.stat, os.scandir, shutil.disk_usage
    monkeypatch.setattr(Path, "stat", lambda self, **more: calls.update(stat=1) or stat(self, **more))
    monkeypatch.setattr(os, "scandir", lambda path: calls.update(scandir=1) or scandir(path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: calls.update(usage=1) or usage(path))
    for number in range(1, 20):
        store.path(names[number])
    assert calls["scandir"] == 0 and calls["stat"] < 10 * 20 and calls["usage"] < 5 * 20
    monkeypatch.undo()
    kept = sorted(int(path.name[:3]) for path in (store.cache_dir / "shards").glob("???.tar"))
    assert kept == list(range(0 if limit is None else 20 - limit, 300))
    assert store.space().used <= store.limit


def test_the_free_disk_space_and_the_copies_limit_a_cache_without_a_configured_limit(server, tmp_path, monkeypatch):
    """A tenth of the disk is left free."""
    url, folder, _ = server
    names, size = serve_equal_shards(url, folder, 3)
    store = ShardStore(tmp_path / "cache")
    for name in names:
        store.path(name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100 * size, 70 * size, 30 * size))
    assert store.space() == (3 * size + 20 * size, 3 * size, size)


def test_processes_share_the_record_of_used_cache_space(server, tmp_path):
    """A copy that another process has made is counted, although the folder is not listed again."""
    url, folder, _ = server
    names, size = serve_equal_shards(url, folder)
    one, other = (ShardStore(tmp_path / "cache", 4 * size / 1e9) for _ in range(2))
    for number, store in enumerate([one, other, one, other, one, one, other]):
        store.path(names[number])
        assert one.space().used <= min(number + 1, 4) * size
    assert one.space().used == 4 * size


@pytest.mark.parametrize("noted", [b"", b"short", bytes(16)])
def test_a_lost_or_incorrect_cache_ledger_is_rebuilt(server, tmp_path, noted):
    url, folder, _ = server
    names, size = serve_equal_shards(url, folder)
    for number in range(5):
        store = ShardStore(tmp_path / "cache", 2 * size / 1e9)  # the store of a separate process, which scans once
        (store.cache_dir / "locks/room").write_bytes(noted)
        store.path(names[number])
        assert store.space().used <= 2 * size


def test_a_cached_shard_used_since_the_last_scan_is_not_evicted(server, tmp_path):
    url, folder, _ = server
    names, size = serve_equal_shards(url, folder)
    one, other = (ShardStore(tmp_path / "cache", 3 * size / 1e9) for _ in range(2))
    for age, name in enumerate(names[:3]):
        os.utime(one.path(name), (age, age))
    one._look()
    other.path(names[0])  # used now, in another process
    one.path(names[3])
    assert [one.copy(name).exists() for name in names[:4]] == [True, False, True, True]


def test_the_cached_shards_needed_last_are_evicted(server, tmp_path):
    url, folder, _ = server
    names = [f"{url}/{i}.tar" for i in range(5)]
    for i in range(5):
        write_tar(folder / f"{i}.tar", members(range(3)))
    size = (folder / "0.tar").stat().st_size
    store = ShardStore(tmp_path / "limited", 3 * size / 1e9)
    for name in names[:3]:
        store.path(name)
    store.keep([names[1], names[4], names[0]])  # shards in the order in which they are needed; names[2] is not needed
    store.path(names[3])
    assert [store.copy(name).exists() for name in names] == [True, True, False, True, False]
    store.path(names[4])
    assert [store.copy(name).exists() for name in names] == [False, True, False, True, True]


def test_shards_are_downloaded_in_advance(server, store):
    url, folder, requests = server
    write_tar(folder / "0.tar", members(range(3)))
    with store.lock(store.name(url + "/0.tar")):  # another process has locked it
        assert store.fetch_ahead(url + "/0.tar")
    assert not requests
    assert not store.fetch_ahead(url + "/missing.tar")
    assert store.fetch_ahead(url + "/0.tar")
    assert requests["/0.tar"] == 1
    assert store.path(url + "/0.tar").exists()
    assert requests["/0.tar"] == 1


def test_a_cache_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir"):
        ShardStore(tmp_path / "file" / "cache")


def test_shards_that_two_datasets_share_are_found_in_all_of_their_sources(tmp_path, store):
    paths = [write_tar(tmp_path / f"{number}.tar", members([number])) for number in range(4)]
    train = open_corpus([SourceConfig(shards=path) for path in paths[:3]], store)
    val = open_corpus([SourceConfig(shards=path) for path in (paths[0], paths[3], paths[2])], store)
    assert val.shared_with(train) == [paths[0], paths[2]]
