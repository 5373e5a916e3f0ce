"""Shards in object stores: moto replaces S3, and a folder behind http replaces Google Cloud Storage."""

import http.server
import json
import sys
import threading
from collections import Counter
from functools import partial
from itertools import chain

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.errors import UserError
from m3ae_fast.config import SourceConfig
from m3ae_fast.data import ShardStore, download, open_corpus
from m3ae_fast.data.download import NotFound
from m3ae_fast.data.manifest import KINDS, rows_of, write
from m3ae_fast.data.shard_names import expand
from tests.data.test_fetcher import bytes_in_cache, epoch
from tests.helpers.shards import members, write_tar

pytestmark = pytest.mark.slow

SHARDS, PER = 8, 8


class _Silent(WSGIRequestHandler):
    def log(self, *args):
        pass


@pytest.fixture
def s3(monkeypatch):
    """Return (client, Counter of GETs by path, dict of faults by path: responses that are sent before the complete
    object, requested ranges)."""
    gets, faults, ranges, moto = Counter(), {}, [], DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response):
        path = environ["PATH_INFO"]
        ranges.append(environ.get("HTTP_RANGE", ""))
        gets[path] += environ["REQUEST_METHOD"] == "GET"
        if environ["REQUEST_METHOD"] != "GET" or not faults.get(path):
            return moto(environ, start_response)
        if (fault := faults[path].pop()) != "short":
            start_response(f"{fault} Fault", [("Content-Length", "0")])
            return [b""]
        whole = b"".join(moto(environ, start_response))
        return [whole[: len(whole) // 2]]

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    variables = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (variables | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}).items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    yield client, gets, faults, ranges
    server.shutdown()
    server.server_close()


def put(client, tmp_path, name, samples):
    path = write_tar(tmp_path / "one.tar", members(samples, "text"))
    client.upload_file(path, "bucket", name)
    return f"s3://bucket/{name}"


def samples(url, store):
    return open_corpus([SourceConfig(shards=[url])], store).samples


def test_shards_are_read_from_s3(s3, tmp_path, store):
    client, gets, *_ = s3
    url = put(client, tmp_path, "a folder/it's.tar", range(3))
    assert samples(url, store) == 3
    assert gets["/bucket/a folder/it's.tar"] == 1
    assert download.read_small(url, 1 << 20) == (tmp_path / "one.tar").read_bytes()


def test_temporary_s3_errors_are_retried(s3, tmp_path, store):
    """If a response breaks off, the download is resumed at the position that was reached."""
    client, gets, faults, ranges = s3
    url = put(client, tmp_path, "a.tar", range(3))
    faults["/bucket/a.tar"] = ["503", "short", "500"]
    assert samples(url, store) == 3
    half = (tmp_path / "one.tar").stat().st_size // 2
    assert gets["/bucket/a.tar"] == 4 and f"bytes={half}-" in ranges[-1] + "-"


@pytest.mark.parametrize(("url", "words"), [
    ("s3://bucket/none.tar", "404 Not Found: .*NoSuchKey"), ("s3://elsewhere/a.tar", "404 Not Found: .*NoSuchBucket"),
])  # fmt: skip
def test_a_missing_s3_object_is_requested_only_once(s3, store, url, words):
    with pytest.raises(UserError, match=rf"shard {url}: cannot be read \(cannot fetch {url}: .*{words}"):
        samples(url, store)
    assert sum(s3[1].values()) == 1


def test_missing_s3_permissions_are_reported_at_once(s3, tmp_path):
    client, _, faults, _ = s3
    url = put(client, tmp_path, "a.tar", range(3))
    faults["/bucket/a.tar"] = ["403"]
    with pytest.raises(NotFound, match="403 Forbidden"):
        download.read_small(url, 1 << 20)


def test_a_public_bucket_needs_no_credentials(s3, tmp_path, store, monkeypatch):
    url = put(s3[0], tmp_path, "a.tar", range(3))
    s3[0].put_object_acl(Bucket="bucket", Key="a.tar", ACL="public-read")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert samples(url, store) == 3


def test_credentials_are_read_from_the_users_aws_profile(s3, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text("[work]\naws_access_key_id = me\naws_secret_access_key = secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    store = s3_and_gs._open("s3", "bucket")
    assert store.credential_provider()["access_key_id"] == "me"


def test_shards_are_read_from_google_cloud_storage(tmp_path, store, monkeypatch):
    (tmp_path / "served/bucket").mkdir(parents=True)
    write_tar(tmp_path / "served/bucket/a.tar", members(range(4)))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            self.send_header("ETag", '"1"')
            super().end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        account = {"client_email": "", "private_key": "", "private_key_id": "", "disable_oauth": True}
        account["gcs_base_url"] = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        assert samples("gs://bucket/a.tar", store) == 4
        server.shutdown()


@pytest.mark.parametrize("url", ["s3://bucket/{0..1}.tar", "gs://bucket/{0..1}.tar"])
def test_without_the_extra_the_error_names_the_package_to_install(tmp_path, store, monkeypatch, url):
    monkeypatch.setitem(sys.modules, "obstore", None)
    first = url.replace("{0..1}", "0")
    line = rf"{first} needs obstore: pip install 'm3ae-fast\[remote\]', or read it with a command: 'pipe:aws s3 cp"
    with pytest.raises(UserError, match=line):
        expand(first)
    with pytest.raises(UserError, match="needs obstore"):
        expand(url)
    write(tmp_path / "m.npy", rows_of([first], [(1, 0, 0)]))
    with pytest.raises(UserError, match=line):
        samples(str(tmp_path / "m.npy"), store)
    assert expand("https://host/a.tar")


def test_four_nodes_download_each_object_once_within_their_disk_limit(s3, load, tmp_path):
    client, gets, *_ = s3
    urls = [put(client, tmp_path, f"{i:02}.tar", range(i * PER, i * PER + PER)) for i in range(SHARDS)]
    size = (tmp_path / "one.tar").stat().st_size
    write(tmp_path / "m.npy", rows_of(urls, [(PER, size, KINDS.index("text"))] * SHARDS))
    source, config = [SourceConfig(shards=str(tmp_path / "m.npy"))], {"lanes": 4, "shuffle_shards": 4}
    nodes = [
        load(source, global_batch=16, rank=node, world=4, steps=SHARDS * PER // 16, config=config,
             at=ShardStore(tmp_path / f"node{node}", 3.5 * size / 1e9))
        for node in range(4)
    ]  # fmt: skip
    seen = list(chain.from_iterable(epoch(nodes)))
    assert len(seen) == len(set(seen)) == SHARDS * PER
    assert SHARDS <= sum(gets.values()) <= 1.05 * SHARDS
    assert all(map(bytes_in_cache, nodes))
