"""Files: how they are kept, found, read as inputs and removed."""

from __future__ import annotations

import base64
from datetime import timedelta
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from receiver_support import receiving
from store_support import TurnedClock, ask, counted_statements, open_store

from tegula.errors import FetchError, InputError, NotFoundError, TooLargeError
from tegula.server.addresses import Policy
from tegula.server.background import Sweeper
from tegula.server.blobs import content_type_of, safe_name
from tegula.server.fetch import CancelToken, Fetcher
from tegula.server.files import decode_data_uri, encode_data_uri
from tegula.server.queue import Report
from tegula.server.tables import FILE_KEY
from tegula.server.work import InputFiles

PNG = b"\x89PNG\r\n\x1a\n" + b"0" * 50
URI = encode_data_uri(PNG, "image/png")


@pytest.fixture
def clock():
    return TurnedClock()


@pytest.fixture
def store(tmp_path, clock):
    opened = open_store(tmp_path, clock, max_upload_bytes=1000)
    yield opened
    opened.close()


@pytest.fixture
def ada(store):
    return store.accounts.ensure("ada").id


@pytest.fixture
def sweep(store):
    return Sweeper(store, unused_for=timedelta()).sweep


def blobs(store):
    return len(list(store.blobs.names()))


def on_disk(store):
    return {path for path in store.blobs.folder.rglob("*") if path.is_file()}


def test_equal_files_are_kept_once_and_named_apart(store, ada):
    one, two = store.files.keep(ada, "a.png", PNG), store.files.keep(ada, "b.png", PNG)
    assert one.sha256 == two.sha256
    assert blobs(store) == 1
    assert store.files.path(one).read_bytes() == PNG


def test_a_file_that_is_too_large_leaves_nothing_behind(store, ada):
    before = on_disk(store)
    with pytest.raises(TooLargeError):
        store.files.keep(ada, "a.png", iter([b"x" * 600] * 2))
    assert on_disk(store) == before


def test_the_type_shows_though_the_first_bytes_come_one_by_one(store, ada):
    assert store.files.keep(ada, None, (bytes([b]) for b in PNG)).content_type == "image/png"


def test_a_source_that_breaks_off_leaves_nothing_behind(store, ada):
    def broken():
        yield b"x"
        raise OSError("the wire was cut")

    before = on_disk(store)
    with pytest.raises(Exception, match="cut"):
        store.files.keep(ada, "a.png", broken())
    assert on_disk(store) == before


def test_files_of_others_and_expired_ones_are_not_found(store, clock, ada):
    file = store.files.keep(ada, "a.png", PNG, lifetime=timedelta(hours=1))
    other = store.accounts.ensure("grace").id
    with pytest.raises(NotFoundError):
        store.files.get(file.id, other)
    assert store.files.page(other).items == ()
    assert store.files.page(ada).items == (file,)
    clock.turn(3600)
    with pytest.raises(NotFoundError):
        store.files.get(file.id, ada)
    assert store.files.page(ada).items == ()


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (PNG, "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (b"\0\0\0\x20ftypavif", "image/avif"),
        (b"<svg onload=x>", "application/octet-stream"),
        (b"<html>", "application/octet-stream"),
        (b"", "application/octet-stream"),
    ],
)
def test_the_type_is_that_of_the_bytes(head, kind):
    assert content_type_of(head, "text/html") == kind


@pytest.mark.parametrize(
    ("name", "kind", "safe"),
    [
        ("cat.png", "image/png", "cat.png"),
        ("../../etc/passwd", "image/png", "passwd.png"),
        ("C:\\pictures\\cat.jpeg", "image/jpeg", "cat.jpeg"),
        ("cat.png", "image/jpeg", "cat.jpg"),
        (None, "image/webp", "file.webp"),
        ('a"b\r\nc.png', "image/png", "a_b__c.png"),
        ("Катя.png", "image/png", "Катя.png"),
        ("..", "application/octet-stream", "file"),
    ],
)
def test_names_are_made_safe(name, kind, safe):
    assert safe_name(name, kind) == safe


@given(st.text(), st.sampled_from(["image/png", "application/octet-stream"]))
def test_no_name_leaves_its_folder(name, kind):
    safe = safe_name(name, kind)
    assert safe.strip(". ")
    assert not set(safe) & set('/\\"\r\n\0')


@given(st.binary())
def test_data_uris_are_read_as_they_are_written(data):
    chunks, kind = decode_data_uri(encode_data_uri(data, "image/png"))
    assert (b"".join(chunks), kind) == (data, "image/png")


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("data:,a%20b", b"a b"),
        ("data:text/plain;charset=utf-8,x", b"x"),
        ("DATA:image/png;name=a.png;base64,aGk=", b"hi"),
        ("data:;base64,aGk", b"hi"),
        ("data:;base64,_-8", b"\xff\xef"),
        ("data:;base64,aG\r\nk%3D", b"hi"),
    ],
)
def test_data_uris_are_read_as_clients_write_them(uri, data):
    assert b"".join(decode_data_uri(uri)[0]) == data


@given(st.binary(max_size=40), st.integers(3, 9), st.sampled_from(["", ";base64"]), st.data())
def test_the_slices_of_a_data_uri_are_not_seen(data, size, coding, draw):
    plain = base64.b64encode(data).decode() if coding else data.decode("latin-1")
    escaped = [
        quote(char, safe="", encoding="latin-1") if draw.draw(st.booleans()) or char == "%"
        else char for char in plain if ord(char) < 128
    ]  # fmt: skip
    expected = data if coding else bytes(byte for byte in data if byte < 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tegula.server.files._SLICE", size)
        assert b"".join(decode_data_uri(f"data:{coding},{''.join(escaped)}")[0]) == expected


@pytest.mark.parametrize(
    "uri",
    ["data:", "data:image/png;base64", "data:;base64,a!b", "data:;base64,a", "data:;base64,YQ==YQ"],
)
@pytest.mark.parametrize("size", [3, 4, 5, 100])
def test_broken_data_uris_are_refused(uri, size, monkeypatch):
    monkeypatch.setattr("tegula.server.files._SLICE", size)
    with pytest.raises(InputError):
        b"".join(decode_data_uri(uri)[0])


def test_data_uris_in_an_input_become_files_of_the_prediction(store, ada):
    values = store.files.adopt({"image": URI, "prompt": URI, "scale": 2}, ada, ["image"])
    assert values["prompt"] == URI
    made = ask(store, input=values)
    file = store.files.get(made.input["image"][FILE_KEY], ada)
    assert (file.prediction_id, file.expires_at) == (made.id, None)


def test_the_files_of_a_request_that_is_refused_expire(store, clock, ada, sweep):
    store.files.adopt({"image": URI}, ada, ["image"])
    clock.turn(3601)
    sweep()
    assert blobs(store) == 0


@pytest.mark.parametrize("where", [lambda f: {"image": f}, lambda f: {"x": [{"y": f}]}])
def test_nobody_asks_for_a_kept_file_by_its_inner_form(store, ada, where):
    other = store.files.keep(store.accounts.ensure("grace").id, "secret.png", PNG)
    with pytest.raises(InputError):
        store.files.adopt(where(store.files.reference(other)), ada, ["image"])


@pytest.fixture
def read(store):
    inputs = InputFiles(
        store.files,
        Fetcher(Policy(private=True, ports=())),
        limit=500,
        seconds=60,
    )

    def read_image(value):
        made = ask(store, input={"image": value})
        if remote := inputs.missing(made, ["image"]):
            inputs.fetch(made, remote, CancelToken())
        return inputs.with_files(made, ["image"])["image"]

    return read_image


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8000/v1/files/{}",
        "http://localhost:8000/v1/v1/files/{}",
        "http://127.0.0.1:8000/files/{}",
        "http://[::1]:8000/v1/files/{}/download?owner=x&expiry=1&signature=y",
        "https://tiles.example.com/api/v1/files/{}",
    ],
)
def test_our_own_files_are_read_from_the_disk_by_any_address(tmp_path, address):
    store = open_store(tmp_path, url_aliases=("https://tiles.example.com/api",))
    ada = store.accounts.ensure("ada").id
    file = store.files.keep(ada, "a.png", PNG)
    inputs = InputFiles(store.files, Fetcher(Policy(private=True)), 500, 60)
    made = ask(store, input={"image": address.format(file.id)})
    assert inputs.with_files(made, ["image"])["image"].read_bytes() == PNG
    store.close()


def test_files_of_others_are_no_inputs_but_their_open_links_are(store, read):
    grace = store.accounts.ensure("grace").id
    file = store.files.keep(grace, "a.png", PNG)
    with pytest.raises(InputError):
        read(store.links.file(file.id))
    link = store.links.output(store.files.reference(file))
    assert read(link).read_bytes() == PNG


def test_inputs_are_fetched_and_kept_with_their_prediction(store, read):
    with receiving() as receiver:
        receiver.body = PNG
        assert read(f"{receiver.url}/cat.png").read_bytes() == PNG
    (made,) = store.predictions.page(None).items
    kept = store.files.fetched(made.id, f"{receiver.url}/cat.png")
    assert (kept.name, store.files.path(kept).read_bytes()) == ("cat.png", PNG)
    with pytest.raises(NotFoundError):
        store.files.fetched(made.id, receiver.url)
    store.predictions.remove(made.id)
    assert Sweeper(store, unused_for=timedelta()).sweep().blobs == 1


def test_what_cannot_be_fetched_is_told_with_the_name_of_the_input(store, read):
    with receiving() as receiver:
        receiver.status = 404
        with pytest.raises(FetchError, match=r"image cannot be fetched: .* status 404"):
            read(receiver.url)


def test_what_is_fetched_is_told_apart_from_what_is_here(store, ada):
    upload = store.links.file(store.files.keep(ada, "a.png", PNG).id)
    values = {"image": "https://a.example/1", "mask": upload, "many": ["https://b.example/2", ""]}
    values |= {"prompt": "https://c.example/3", "data": "data:,x", "none": None}
    fields = ["image", "mask", "many", "data", "none"]
    found = [(remote.name, remote.url) for remote in store.files.remote(values, fields)]
    assert found == [("image", "https://a.example/1"), ("many", "https://b.example/2")]


@pytest.mark.parametrize("change", [lambda t: t[:-1] + "!", lambda t: "x" + t, lambda t: ""])
def test_a_link_that_we_never_gave_out_opens_nothing(store, ada, change):
    token = store.links.signer.token("output", store.files.keep(ada, "a.png", PNG).id)
    assert store.links.opened(token) is not None
    assert store.links.opened(change(token)) is None
    assert store.links.streamed(token) is None


def finished(store, **values):
    name = ask(store, **values).id
    attempt = store.queue.claim("worker").attempt
    store.queue.start(name, attempt)
    made = store.files.keep(store.accounts.ensure("ada").id, "o.png", b"out", prediction_id=name)
    store.queue.report(name, attempt, Report("line\n", (store.files.reference(made),)))
    store.queue.succeed(name, attempt)
    return name


def test_after_its_time_a_prediction_keeps_nothing_but_its_row(store, clock, ada, sweep):
    name = finished(store, input=store.files.adopt({"image": URI}, ada, ["image"]))
    clock.turn(store.settings.retention_seconds - 1)
    assert sweep().predictions == 0
    assert blobs(store) == 2
    clock.turn(1)
    assert sweep().predictions == 1
    now = store.predictions.get(name)
    assert (now.data_removed, now.input, now.output, now.logs) == (True, {}, None, "")
    assert store.predictions.events(name) == ()
    assert blobs(store) == 0
    assert store.usage.lines() != ()


def test_what_a_late_worker_makes_of_a_removed_prediction_is_removed_too(store, ada, sweep):
    name = finished(store)
    assert store.predictions.remove(name).data_removed
    store.files.keep(ada, "late.png", PNG, prediction_id=name)
    assert sweep().files == 1
    assert blobs(store) == 0


def test_the_files_of_a_run_that_was_lost_are_removed(store, ada, sweep):
    name = ask(store).id
    attempt = store.queue.claim("worker").attempt
    store.queue.start(name, attempt)
    made = store.files.keep(ada, "o.png", b"half", prediction_id=name)
    store.queue.report(name, attempt, Report(outputs=(store.files.reference(made),)))
    store.queue.lose(name, attempt, "its process ended")
    sweep()
    assert blobs(store) == 0


def test_shared_and_unfinished_predictions_keep_their_data(store, clock, sweep):
    store.predictions.share(finished(store))
    ask(store)
    clock.turn(10**6)
    assert sweep().predictions == 0


def test_bytes_stay_while_any_file_names_them(store, clock, ada, sweep):
    store.files.keep(ada, "a.png", PNG, lifetime=timedelta(seconds=5))
    kept = store.files.keep(ada, "b.png", PNG)
    clock.turn(10)
    assert sweep().files == 1
    assert store.files.path(kept).read_bytes() == PNG


def test_a_sweep_does_not_take_the_lock_to_write_for_each_blob(store, ada):
    def locks(files: int) -> int:
        for number in range(files):
            kept = store.files.keep(ada, "a.png", PNG + bytes([files, number]))
            if number % 2:
                store.files.delete(kept.id)
        with counted_statements(store, begins="BEGIN IMMEDIATE") as begun:
            assert Sweeper(store, unused_for=timedelta()).sweep().blobs == files // 2
        return len(begun)

    few = locks(4)
    assert locks(80) == few
    assert blobs(store) == 42


def test_a_sweep_goes_on_past_folders_that_vanish(store, ada):
    """A link to nowhere is what a folder is that vanished between the listing and the look."""
    spool = store.settings.folder / "spool"
    spool.mkdir()
    store.files.delete(store.files.keep(ada, "a.png", PNG).id)
    for vanished in (spool / "run", store.blobs.folder / "ab"):
        vanished.symlink_to(vanished.with_name("gone"))
    assert Sweeper(store, unused_for=timedelta()).sweep().blobs == 1


def test_bytes_that_were_just_put_are_left_alone(store, ada):
    store.files.delete(store.files.keep(ada, "a.png", PNG).id)
    assert Sweeper(store).sweep().blobs == 0


def test_without_retention_data_stays(tmp_path, clock):
    store = open_store(tmp_path, clock, retention_seconds=0)
    name = finished(store)
    clock.turn(10**8)
    Sweeper(store, unused_for=timedelta()).sweep()
    assert store.predictions.get(name).output
    store.close()


def test_base64_is_not_kept_in_rows(store, ada):
    made = ask(store, input=store.files.adopt({"image": URI}, ada, ["image"]))
    assert base64.b64encode(PNG).decode() not in str(store.predictions.get(made.id))
