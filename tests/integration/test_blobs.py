"""Stored bytes: what every place of them promises, and what object stores add to it."""

from __future__ import annotations

import hashlib
import http.server
import os
import sys
import threading
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from api_support import DATA_URI, PNG, Server, open_server
from obstore.store import MemoryStore
from starlette.testclient import TestClient
from store_support import SECRET, open_store

from tegula.errors import (
    MissingExtraError,
    OptionError,
    ServiceError,
    StorageError,
    TooLargeError,
)
from tegula.server.api.app import create_app
from tegula.server.background import Sweeper
from tegula.server.blobs import FolderBlobs
from tegula.server.db import utc_now
from tegula.server.object_blobs import ObjectBlobs, open_bucket
from tegula.server.settings import ServerSettings, load_settings
from tegula.server.tables import State

MANY = 1 << 30
NOBODY = "00" * 32


def objects(folder: Path, store: MemoryStore, copies_bytes: int = MANY) -> ObjectBlobs:
    return ObjectBlobs("memory", store, folder, copies_bytes, store)


@pytest.fixture(params=["folder", "memory", "s3"])
def blobs(request, tmp_path):
    if request.param == "folder":
        return FolderBlobs(tmp_path)
    if request.param == "memory":
        return objects(tmp_path, MemoryStore())
    return open_bucket(request.getfixturevalue("bucket"), tmp_path, MANY)


def test_equal_bytes_are_kept_once_until_they_are_removed(blobs):
    blob = blobs.put([PNG[:5], PNG[5:]], 1000)
    assert blobs.put([PNG], 1000) == blob
    assert (blob.sha256, blob.size) == (hashlib.sha256(PNG).hexdigest(), len(PNG))
    assert (list(blobs.names()), list(blobs.names(60))) == ([blob.sha256], [])
    assert blobs.path(blob.sha256).read_bytes() == PNG
    assert 0 <= blobs.age(blob.sha256) < 60
    assert blobs.free_bytes() > 0 if not isinstance(blobs, ObjectBlobs) else blobs.claim()
    blobs.clean(0)
    for _ in range(2):  # also one that is gone
        blobs.remove(blob.sha256)
        assert (list(blobs.names()), blobs.age(blob.sha256)) == ([], -1)
    assert not blobs.path(blob.sha256).exists()


def test_what_is_too_large_leaves_nothing_behind(blobs):
    with pytest.raises(TooLargeError):
        blobs.put([b"x" * 600] * 2, 1000)
    assert list(blobs.names()) == []
    assert [path for path in blobs.folder.rglob("*") if path.is_file()] == []


def test_a_place_is_told_from_every_other(blobs):
    claimed = blobs.claim()
    assert blobs.identity() == claimed != ""
    if isinstance(blobs, ObjectBlobs):
        assert blobs.free_bytes() > 0
        with pytest.raises(ServiceError, match="files of another database"):
            blobs.claim()


def test_one_download_serves_all_who_ask_at_once(tmp_path, monkeypatch):
    bucket, reads, go = MemoryStore(), [], threading.Event()
    data = os.urandom(100)
    name = objects(tmp_path / "a", bucket).put([data], 1000).sha256
    other = objects(tmp_path / "b", bucket)
    get_range = obstore.get_range

    def slow(*args, **options):
        reads.append(options["start"])
        go.wait(30)
        return get_range(*args, **options)

    monkeypatch.setattr(obstore, "get_range", slow)
    monkeypatch.setattr("tegula.server.object_blobs._PART", 40)
    found = []
    asking = [threading.Thread(target=lambda: found.append(other.path(name))) for _ in range(4)]
    for thread in asking:
        thread.start()
    go.set()
    for thread in asking:
        thread.join()
    assert [path.read_bytes() for path in found] == [data] * 4
    assert reads == [0, 40, 80]
    assert other.path(name).read_bytes() == data
    assert len(reads) == 3


def test_copies_go_when_they_are_unused_or_too_many_and_come_back(tmp_path):
    blobs = objects(tmp_path, MemoryStore(), copies_bytes=250)
    names = [blobs.put([bytes([number]) * 100], 1000).sha256 for number in range(4)]
    copies = FolderBlobs(tmp_path)
    blobs.clean(3600)
    assert set(copies.names()) == set(names)  # they are in use, though too many
    ages = (100_000, 3000, 2000, 0)
    for name, age in zip(names, ages, strict=True):
        used = copies.path(name).stat().st_mtime - age
        os.utime(copies.path(name), (used, used))
    blobs.clean(3600)
    assert set(copies.names()) == set(names[2:])
    assert set(blobs.names()) == set(names)
    assert blobs.path(names[0]).read_bytes() == bytes(100)


def test_other_bytes_than_were_put_are_not_given_out(tmp_path):
    bucket = MemoryStore()
    name = objects(tmp_path / "a", bucket).put([b"right"], 10).sha256
    obstore.put(bucket, f"{name[:2]}/{name}", b"wrong")
    other = objects(tmp_path / "b", bucket)
    for _ in range(2):
        with pytest.raises(StorageError, match="other bytes"):
            other.path(name)
    assert list(FolderBlobs(tmp_path / "b").names()) == []


class Failing(http.server.BaseHTTPRequestHandler):
    status = 503

    def answer(self) -> None:
        body = f"<Error><Code>No</Code><AWSAccessKeyId>{SECRET}</AWSAccessKeyId></Error>".encode()
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    do_GET = do_PUT = do_HEAD = do_POST = answer  # noqa: N815

    def log_message(self, *_) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (503, "answers with 503"),
        (403, "refuses what it is shown to sign in"),
        (None, "does not answer"),
    ],
)
def test_a_store_that_fails_is_said_in_a_sentence_without_its_words(
    tmp_path, sign_in, monkeypatch, status, said
):
    monkeypatch.setattr("tegula.storage._RETRIES_FOR", timedelta(seconds=0))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing) as failing:
        sign_in(f"http://127.0.0.1:{failing.server_port}")
        threading.Thread(target=failing.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(Failing, "status", status)
        if status is None:
            failing.shutdown()
            failing.server_close()
        blobs = open_bucket("s3://bucket", tmp_path, MANY)
        for call in (
            blobs.identity, blobs.claim, blobs.free_bytes, lambda: list(blobs.names()),
            lambda: blobs.put([PNG], 1000), lambda: blobs.path(NOBODY), lambda: blobs.age(NOBODY),
            lambda: blobs.remove(NOBODY),
        ):  # fmt: skip
            with pytest.raises(StorageError, match=said) as raised:
                call()
            assert SECRET not in str(raised.value)
            assert raised.value.__cause__ is None
        if status is not None:
            failing.shutdown()


def test_two_servers_on_one_database_and_bucket_are_one(tmp_path, bucket):
    """With folders of their own, outputs of one were 404 by the other and inputs not found."""
    url = f"sqlite:///{tmp_path / 'shared.sqlite3'}"
    one = open_server(tmp_path / "a", database_url=url, blobs_url=bucket, blobs_link_seconds=60)
    store = open_store(tmp_path / "b", utc_now, database_url=url, blobs_url=bucket)
    client = TestClient(create_app(store), base_url="https://tile.example")
    client.headers["authorization"] = f"Bearer {one.token}"
    two = Server(client, store, one.token)
    with one.client, two.client:
        made = one.create()["id"]
        source = two.store.files.of_input(
            two.store.predictions.get(made).input["image"], two.store.predictions.get(made)
        )
        assert two.store.files.path(source).read_bytes() == PNG
        result = PNG + b"result"
        two.work(data=result)
        output = one.get(f"/v1/predictions/{made}").json()["output"]
        assert two.get(output).content == result
        assert one.client.head(output).headers["content-length"] == str(len(result))
        link = one.get(output, follow_redirects=False)
        assert (link.status_code, link.headers["cache-control"]) == (302, "no-store")
        assert "X-Amz-Expires=60" in link.headers["location"]
        assert SECRET not in link.text + str(link.headers)
        import httpx

        fetched = httpx.get(link.headers["location"])
        assert (fetched.content, fetched.headers["content-type"]) == (result, "image/png")
        # What one removes is gone for both, and copies do not bring it back.
        one.client.delete(f"/v1/predictions/{made}")
        assert Sweeper(one.store, unused_for=timedelta()).sweep().blobs == 2
        assert list(two.store.blobs.names()) == []
        assert two.get(output).status_code == 404
    for other in ({"blobs_url": f"{bucket}/other"}, {"blobs_url": None}):
        with pytest.raises(ServiceError, match="another folder or bucket"):
            open_store(tmp_path / "c", database_url=url, **other)
    with pytest.raises(ServiceError, match="files of another database"):
        open_store(tmp_path / "d", blobs_url=bucket)
    for server in (one, two):
        server.store.close()


def test_while_a_store_is_away_requests_say_so_and_nothing_is_lost(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    server = open_server(
        tmp_path / "a", blobs_url=f"file://{tmp_path / 'bucket'}", public_url="http://tile.example"
    )
    store = server.store
    with server.client:
        made = server.create()["id"]
        server.work()
        output = store.links.output(store.predictions.get(made).output)
        for copy in FolderBlobs(store.blobs.folder).names():
            store.blobs.path(copy).unlink()

        def away(*_, **__):
            raise obstore.exceptions.GenericError("Server error: 503 Service Unavailable")

        with monkeypatch.context() as patch:
            for name in ("put", "get", "head", "get_range", "list", "delete"):
                patch.setattr(obstore, name, away)
            shown = server.get(f"/v1/predictions/{made}").json()["output"]
            assert shown.startswith("http://tile.example/o/")
            body = {"version": "tegula/upscale", "input": {"image": DATA_URI}}
            for refused in (
                server.get("/readyz"),
                server.get(output),
                server.client.post("/v1/files", files={"content": ("a.png", PNG)}),
                server.post("/v1/predictions", body),
            ):
                assert refused.status_code == 503, refused.text
                assert refused.json()["detail"] == (
                    "The object store answers with 503; try again later."
                )
            assert Sweeper(store, unused_for=timedelta()).sweep().blobs == 0
        assert server.get(output).content == PNG
        assert server.get("/readyz").status_code == 200
        assert store.predictions.get(made).status is State.SUCCEEDED
    store.close()


def test_a_stream_reads_outputs_beside_the_event_loop(tmp_path, monkeypatch):
    server = open_server(tmp_path, public_url="http://tile.example")
    with server.client:
        made = server.create()["id"]
        server.work()
        threads = []
        path = FolderBlobs.path

        def noted(blobs, name):
            threads.append(threading.current_thread().name)
            return path(blobs, name)

        monkeypatch.setattr(FolderBlobs, "path", noted)
        found = server.store.predictions.get(made)
        assert "data:image/png" in server.get(server.store.links.stream(found.id)).text
    assert threads
    assert not [name for name in threads if not name.startswith("AnyIO worker")]
    server.store.close()


def test_the_names_in_a_bucket_are_looked_at_every_ten_minutes(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    store = open_store(tmp_path / "a", blobs_url=f"file://{tmp_path / 'bucket'}")
    sweeper = Sweeper(store, unused_for=timedelta())
    store.blobs.put([PNG], 1000)
    assert sweeper.sweep().blobs == 1
    store.blobs.put([PNG], 1000)
    assert sweeper.sweep().blobs == 0
    sweeper._list_at -= 601
    assert sweeper.sweep().blobs == 1
    store.close()


def test_without_the_client_of_object_stores_one_sentence_says_what_to_install(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "tegula.server.object_blobs")
    with pytest.raises(MissingExtraError, match=r"pip install 'tegula\[objects\]'"):
        open_store(tmp_path, utc_now, blobs_url="s3://bucket")


@pytest.mark.parametrize(
    "url",
    ["bucket", "ftp://bucket/a", "s3://", f"s3://key:{SECRET}@bucket", f"s3://b?key={SECRET}"],
)
def test_an_address_that_is_no_bucket_or_holds_secrets_is_refused(url):
    with pytest.raises(OptionError, match="blobs_url") as refused:
        load_settings(blobs_url=url)
    assert SECRET not in str(refused.value)


def test_what_is_missing_to_sign_in_is_said(tmp_path, monkeypatch):
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StorageError, match="Account must be specified"):
        open_bucket("az://container/prefix", tmp_path, 1)
    assert ServerSettings(blobs_url="s3://bucket/a/").blobs_url == "s3://bucket/a"
