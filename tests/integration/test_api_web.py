"""What only the pages ask for: history, facts, tiles, thumbnails; and previews in the stream."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from api_support import PNG, Server
from PIL import Image
from sqlalchemy import select
from store_support import VERSION, ask, open_store

from tegula.images.tiles import cut_tiles, draw_thumbnail
from tegula.progress import Cancelled
from tegula.server.background import Sweeper
from tegula.server.engine import Done, EngineEvent, Job, OutputFile, Preview, Started
from tegula.server.queue import Report
from tegula.server.store import Store
from tegula.server.tables import FileRecord, State
from tegula.server.work import PredictionRunner, ResolvedVersion, allow_all

NOBODY = {"authorization": ""}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    bands = [Image.effect_noise((width, height), 90) for _ in mode]
    return Image.merge(mode, bands)


def opened(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Tiles.


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_the_tiles_of_the_first_level_are_the_picture_and_each_further_is_half(tmp_path, mode):
    image = noise(700, 530, mode)
    (tmp_path / "source").write_bytes(png_of(image))
    cut_tiles(tmp_path / "source", tmp_path / "levels", 10**6)
    manifest = json.loads((tmp_path / "levels" / "manifest.json").read_text())
    sizes = [(one["width"], one["height"]) for one in manifest["levels"]]
    assert sizes == [(700, 530), (350, 265)]
    whole = Image.new(mode, image.size)
    for path in (tmp_path / "levels" / "0").iterdir():
        column, row = map(int, path.stem.split("-"))
        whole.paste(opened(path), (512 * column, 512 * row))
    assert whole.tobytes() == image.tobytes()
    kind = manifest["levels"][1]["kind"]
    assert kind == ("jpg" if mode == "RGB" else "png")
    assert opened(tmp_path / "levels" / "1" / f"0-0.{kind}").size == (350, 265)


def test_tiles_and_thumbnails_are_upright_and_show_any_depth(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(40, 20).save(tmp_path / "turned", "JPEG", exif=exif)
    Image.new("I;16", (30, 20), 0x8000).save(tmp_path / "deep", "PNG")
    draw_thumbnail(tmp_path / "turned", tmp_path / "turned.jpg", 10**6)
    assert opened(tmp_path / "turned.jpg").size == (20, 40)
    cut_tiles(tmp_path / "deep", tmp_path / "levels", 10**6)
    assert opened(tmp_path / "levels" / "0" / "0-0.png").getpixel((3, 3)) == (128, 128, 128)


def test_pictures_are_looked_at_by_their_owner_and_by_whom_they_are_shared_with(server: Server):
    image = noise(600, 20)
    made = server.create(scale=2)["id"]
    server.work(data=png_of(image))
    tiles = f"/v1/web/predictions/{made}/tiles"
    assert server.get(f"{tiles}/0/0/0-0.png").status_code == 404  # not cut yet
    manifest = server.get(f"{tiles}/0").json()
    assert (manifest["width"], manifest["height"], manifest["tile"]) == (600, 20, 512)
    tile = server.get(f"{tiles}/0/0/1-0.png")
    assert Image.open(io.BytesIO(tile.content)).tobytes() == image.crop((512, 0, 600, 20)).tobytes()
    assert server.get(f"{tiles}/source").json()["width"] == 3
    thumbnail = server.get(f"/v1/web/predictions/{made}/thumbnail")
    assert Image.open(io.BytesIO(thumbnail.content)).size == (320, 11)
    for wrong in ("1", "-1", "x", "0/9/0-0.png", "0/0/..%2f..%2fmanifest.json", "0/0/.x"):
        assert server.get(f"{tiles}/{wrong}").status_code == 404, wrong
    assert server.get(f"{tiles}/0", headers=NOBODY).status_code == 401
    other = server.store.accounts.create_token(server.store.accounts.ensure("bo").id, "x")[1]
    assert server.get(f"{tiles}/0", headers={"authorization": f"Bearer {other}"}).status_code == 404
    url = server.post(f"/v1/predictions/{made}/share").json()["url"]
    shared = f"/v1/shared/{url.partition('share=')[2]}"
    assert server.get(f"{shared}/tiles/0", headers=NOBODY).json() == manifest
    assert server.get(f"{shared}/tiles/0/0/1-0.png", headers=NOBODY).content == tile.content
    assert server.get(f"{shared}/facts", headers=NOBODY).json()["outputs"][0]["size"]
    # Tiles go with the file, and when nobody has looked for a day.
    (folder,) = {path.parent.parent for path in server.store.tiles._folder.rglob("1-0.png")}
    Sweeper(server.store).sweep()
    assert folder.exists()
    os.utime(folder.parent, (1, 1))
    Sweeper(server.store).sweep()
    assert not folder.exists()
    assert server.get(f"{tiles}/0").json() == manifest
    server.client.delete(f"/v1/predictions/{made}")
    Sweeper(server.store).sweep()
    assert list(server.store.tiles._folder.glob("??/*")) == []


def test_a_result_that_is_no_picture_is_said_in_a_sentence(server: Server):
    made = server.create()["id"]
    server.work(data=b"\x89PNG\r\n\x1a\nnothing")
    refused = server.get(f"/v1/web/predictions/{made}/tiles/0")
    assert refused.status_code == 422
    assert refused.json()["detail"].startswith("The picture ")


# History and facts.


def test_the_history_has_names_filters_and_tells_when_data_goes(server: Server):
    uploaded = server.client.post("/v1/files", files={"content": ("holiday.png", PNG)}).json()
    named = server.create(image=uploaded["urls"]["get"], scale=2)["id"]
    server.work()
    fetched = server.create(image="https://example.com/a/sun%20set.png?x=1")["id"]
    page = server.get("/v1/web/history").json()
    assert [one["name"] for one in page["results"]] == ["sun set.png", "holiday.png"]
    assert page["retention_seconds"] == 3600
    last = page["results"][1]
    assert last["removed_at"] is not None
    assert last["chosen"] == {"scale": 2}
    for filters, found in (
        ("status=active", [fetched]),
        ("status=succeeded", [named]),
        ("status=failed", []),
        ("source=web", []),
        ("model=tegula/upscale", [fetched, named]),
        ("model=other/model", []),
    ):
        results = server.get(f"/v1/web/history?{filters}").json()["results"]
        assert [one["id"] for one in results] == found, filters
    server.client.delete(f"/v1/predictions/{named}")
    assert [one["id"] for one in server.get("/v1/web/history").json()["results"]] == [fetched]
    both = server.get("/v1/web/history?removed=true").json()["results"]
    assert [one["data_removed"] for one in both] == [False, True]
    assert server.get("/v1/web/history", headers=NOBODY).status_code == 401


def test_a_place_in_the_queue_counts_what_came_before(server: Server):
    made = [server.create()["id"] for _ in range(3)]
    claimed = server.store.queue.claim("tests")
    assert claimed is not None
    server.store.queue.start(claimed.id, claimed.attempt)
    server.store.queue.report(claimed.id, claimed.attempt, Report(progress=0.5))
    places = [server.get(f"/v1/web/predictions/{one}").json()["place"] for one in made]
    assert places[0] is None  # it runs
    assert [one["ahead"] for one in places[1:]] == [1, 2]
    each = places[1]["own"]
    assert [one["seconds"] for one in places[1:]] == pytest.approx([0.5 * each, 1.5 * each])


# Previews.


def test_the_last_preview_is_in_the_stream_of_those_who_want_it(server: Server):
    made = server.create()
    claimed = server.store.queue.claim("tests")
    assert claimed is not None
    held = claimed.id, claimed.attempt
    server.store.queue.start(*held)
    for name in ("one.png", "two.png"):
        kept = server.store.files.keep(claimed.account_id, name, PNG, prediction_id=claimed.id)
        server.store.queue.report(*held, Report(preview=server.store.files.reference(kept)))
    server.store.queue.succeed(*held)
    path = made["urls"]["stream"].removeprefix("https://tile.example")
    shown = server.get(f"{path}?previews=1").text
    (line,) = [one for one in shown.split("\n\n") if one.startswith("event: preview")]
    assert line.endswith("two.png")
    assert "preview" not in server.get(f"{path}?logs=1").text


class Watched:
    """An engine that shows two previews, if it is to show any, and makes one picture."""

    device = "here"
    shares_blobs = False
    wants_help = False

    def __init__(self, store: Store) -> None:
        self.store = store
        self.jobs: list[Job] = []
        self.kept: list[int] = []

    def run(self, job: Job, cancelled: Cancelled) -> Iterator[EngineEvent]:
        self.jobs.append(job)
        yield Started()
        for number in (1, 2) if job.previews else ():
            yield Preview(b"\xff\xd8\xff" + bytes([number]))
            self.kept.append(len(_previews(self.store)))
        (job.folder / "out-0.png").write_bytes(PNG)
        yield OutputFile(job.folder / "out-0.png", "out-0.png", "image/png")
        yield Done()


def _previews(store: Store) -> list[FileRecord]:
    with store.database.read() as session:
        named = select(FileRecord).where(FileRecord.name.startswith("preview"))
        return list(session.scalars(named))


@pytest.mark.parametrize(("source", "checked"), [("web", False), ("web", True), ("api", False)])
def test_only_what_the_page_created_runs_with_previews_which_go_with_the_run(
    tmp_path, source, checked
):
    store = open_store(tmp_path)
    ask(store, source=source)
    claimed = store.queue.claim("tests")
    assert claimed is not None
    engine = Watched(store)
    inputs = SimpleNamespace(missing=lambda *_: None, with_files=lambda *_, **__: {})
    checker = (lambda _prediction, _path: False) if checked else allow_all
    PredictionRunner(store, lambda _: ResolvedVersion(VERSION, (), True), inputs, checker).run(
        claimed, engine, lambda: False
    )
    wanted = source == "web" and not checked  # what nobody has checked is not shown
    assert engine.jobs[0].previews is wanted
    assert engine.kept == ([1, 1] if wanted else [])
    assert _previews(store) == []
    assert store.predictions.get(claimed.id).status is State.SUCCEEDED
