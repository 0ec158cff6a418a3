"""`tegula batch`, with a model of this process."""

import json
import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from cli_support import PLAIN, names_in, picture_bytes, put, run, size_of

from tegula import upscaler as upscaler_module
from tegula.cli.batch import BatchRun, Input, Pace
from tegula.cli.batch_jobs import BatchJob, Counts, Journal, Outcome
from tegula.cli.console import Console, Failure
from tegula.cli.models import Runtime
from tegula.cli.pictures import Request
from tegula.cli.targets import Naming
from tegula.errors import CancelledError, MissingWeightsError, NumericalError
from tegula.models import BundleSettings
from tegula.options import UpscaleOptions
from tegula.storage import Entry, FolderStorage, open_store
from tegula.upscaler import Upscaler
from tests.tiny.networks import tiny_bundle

MANIFEST = "tegula-manifest.jsonl"


class Upscales:
    """A model that counts what it does; ``errors`` has what it raises at which count."""

    def __init__(self, upscaler):
        self.upscaler = upscaler
        self.count = 0
        self.errors = {}

    def upscale(self, *arguments, **named):
        self.count += 1
        if error := self.errors.get(self.count):
            raise error
        return self.upscaler.upscale(*arguments, **named)


@pytest.fixture(scope="module")
def tiny():
    return Upscaler(tiny_bundle())


@pytest.fixture(autouse=True)
def upscales(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    counting = Upscales(tiny)
    monkeypatch.setattr(upscaler_module.Upscaler, "load", staticmethod(lambda **_: counting))
    return counting


def batch(*words):
    return run("batch", *words, *PLAIN)


def rows(folder="out"):
    lines = Path(folder, MANIFEST).read_text().splitlines()
    return [row for row in map(json.loads, lines) if "source" in row]


def last(name, folder="out"):
    return next(row for row in reversed(rows(folder)) if Path(row["source"]).name == name)


def two_pictures():
    put(Path("in/a.jpg"))
    put(Path("in/deep/er/b.png"))


def test_a_folder_goes_into_another_once_with_all_below_it(upscales):
    two_pictures()
    put(Path("in/.hidden.png"))
    Path("in/notes.txt").write_text("no picture")
    # The output lies inside, and its pictures are no sources.
    done = batch("in", "in/out")
    assert done.exit_code == 0, done.stderr
    assert names_in(Path("in/out")) == ["a.jpg", "deep/er/b.png", MANIFEST]
    assert size_of("in/out/deep/er/b.png") == (24, 16)
    assert "1 file is not a picture by its name and is left out." in done.stderr
    assert "2 done; " in done.stderr
    assert "pictures/s" in done.stderr
    row = last("a.jpg", "in/out")
    facts = ("output", "status", "attempts", "width", "height", "seed")
    assert [row[name] for name in facts] == ["a.jpg", "done", 1, 24, 16, 7]
    again = batch("in", "in/out")
    assert (again.exit_code, upscales.count) == (0, 2)
    assert "2 skipped, done before" in again.stderr


def test_what_changed_is_done_again_and_nothing_else(upscales):
    two_pictures()
    batch("in", "out")
    put(Path("in/a.jpg"), width=9)
    batch("in", "out")
    assert (upscales.count, size_of("out/a.jpg")) == (3, (18, 16))
    Path("out/deep/er/b.png").unlink()
    batch("in", "out")
    assert (upscales.count, size_of("out/deep/er/b.png")) == (4, (24, 16))
    batch("in", "out", "--scale", "3")
    assert (upscales.count, size_of("out/a.jpg")) == (6, (27, 24))
    batch("in", "out", "--scale", "3", "--max-pixels", "9999")  # makes no other picture
    assert upscales.count == 6
    batch("in", "out", "--scale", "3", "--overwrite")
    assert upscales.count == 8


def test_what_failed_is_listed_and_tried_again_by_the_next_run(upscales):
    two_pictures()
    Path("in/bad.jpg").write_bytes(b"no picture")
    done = batch("in", "out")
    assert done.exit_code == 3
    assert "in/bad.jpg is not a PNG" in done.stderr
    assert "2 done, 1 failed" in done.stderr
    row = last("bad.jpg")
    assert [row["status"], row["error"]["code"], row["attempts"]] == ["failed", "invalid_image", 1]
    batch("in", "out")
    assert (upscales.count, last("bad.jpg")["attempts"]) == (2, 2)
    put(Path("in/bad.jpg"))
    assert batch("in", "out").exit_code == 0
    assert (last("bad.jpg")["status"], last("bad.jpg")["attempts"]) == ("done", 1)


def test_what_may_succeed_is_tried_again_within_a_run(upscales):
    two_pictures()
    upscales.errors = {1: NumericalError("The model returned NaN.")}
    assert batch("in", "out").exit_code == 0
    assert (upscales.count, last("a.jpg")["attempts"], last("b.png")["attempts"]) == (3, 2, 1)
    upscales.errors = {4: NumericalError("The model returned NaN.")}
    done = batch("in", "again", "--retries", "0")
    assert done.exit_code == 7
    assert last("a.jpg", "again")["error"]["code"] == "not_finite"


def test_two_sources_of_one_result_are_told_of_and_the_first_keeps_it(upscales):
    put(Path("in/a.bmp"))
    put(Path("in/a.png"), width=9)
    for attempts in (1, 2):
        done = batch("in", "out")
        assert done.exit_code == 2
        assert "a.bmp and " in done.stderr
        assert "a.png would both be a.png; give them outputs of their own." in done.stderr
        assert (upscales.count, size_of("out/a.png")) == (1, (24, 16))
        assert last("a.png")["attempts"] == attempts or attempts == 2


def test_what_was_finished_before_a_kill_is_finished_without_its_line(upscales):
    two_pictures()
    batch("in", "out")
    # Killed within the second line, before the first was all on disk.
    path = Path("out", MANIFEST)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0] + b'{"source": "/')
    done = batch("in", "out")
    assert (done.exit_code, upscales.count) == (0, 2)
    assert path.read_text().splitlines()[1] == '{"source": "/'
    text = "".join(line + "\n" for line in path.read_text().splitlines() if line != '{"source": "/')
    path.write_text(text)
    assert [(row["status"], row["width"], row["seed"]) for row in rows()] == [("done", 24, 7)] * 2


def test_a_stopped_run_goes_on(upscales):
    two_pictures()
    upscales.errors = {2: CancelledError()}
    done = batch("in", "out")
    assert done.exit_code == 130
    assert "1 done, 1 not done" in done.stderr
    assert names_in(Path("out")) == ["a.jpg", MANIFEST]
    assert batch("in", "out").exit_code == 0
    assert upscales.count == 3


def test_a_file_that_tegula_did_not_make_stays(upscales):
    two_pictures()
    put(Path("out/a.jpg"), width=5)
    done = batch("in", "out")
    assert done.exit_code == 2
    assert "out/a.jpg exists and was not made by tegula; --overwrite replaces it." in done.stderr
    assert (upscales.count, size_of("out/a.jpg")) == (1, (5, 8))
    assert batch("in", "out", "--overwrite").exit_code == 0
    assert size_of("out/a.jpg") == (24, 16)


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["in"], 2, "as the last argument, the folder or address for their results"),
        (["in", "in"], 2, "The results would lie among their sources in in"),
        (["in", "in/../in/"], 2, "The results would lie among their sources"),
        (["nowhere", "out"], 5, "nowhere does not exist."),
        (["in", "out.png"], 2, "out.png is not a folder"),
        (["https://example.com/in", "out"], 2, "no address that begins with one of s3://, gs://"),
    ],
)
def test_refused_before_any_work(upscales, words, status, sentence):
    two_pictures()
    done = batch(*words)
    assert (done.exit_code, upscales.count) == (status, 0)
    assert sentence in done.stderr


def test_results_do_not_go_into_the_folder_of_other_sources():
    put(Path("all/in/in/a.jpg"))
    put(Path("all/in/b.jpg"))
    done = batch("all/in", "all")
    assert done.exit_code == 2
    assert "in/in/a.jpg: Its result would lie among the sources in" in done.stderr
    assert size_of("all/in/in/a.jpg") == (12, 8)
    assert size_of("all/b.jpg") == (24, 16)


def test_programs_get_a_line_for_each_picture_and_single_files_are_taken():
    two_pictures()
    done = batch("in/a.jpg", "in/deep", "out", "--json")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["output"] for record in records] == ["a.jpg", "er/b.png"]
    assert done.stderr == ""


def test_a_prefix_of_a_bucket_goes_into_another_and_what_is_there_is_not_read_again(
    upscales, bucket, monkeypatch
):
    import obstore

    monkeypatch.setattr("tegula.storage._LINES_OF_A_PART", 2)
    store = open_store(bucket)
    for key in ("in/a.jpg", "in/deep/b.png", "in/notes.txt"):
        obstore.put(store, key, picture_bytes("JPEG" if key.endswith("jpg") else "PNG"))
    done = batch(f"{bucket}/in", f"{bucket}/in/out")
    assert done.exit_code == 0, done.stderr
    assert "2 done; " in done.stderr
    keys = sorted(each["path"] for page in obstore.list(store, "in/out") for each in page)
    parts = [f"in/out/tegula-manifest/{number:07}.jsonl" for number in range(2)]
    assert keys == ["in/out/a.jpg", "in/out/deep/b.png", *parts]
    lines = [bytes(obstore.get(store, part).bytes()).splitlines() for part in parts]
    assert [len(each) for each in lines] == [2, 1]
    row = json.loads(lines[0][1])
    assert (row["source"], row["output"], row["width"]) == (f"{bucket}/in/a.jpg", "a.jpg", 24)
    again = batch(f"{bucket}/in", f"{bucket}/in/out")
    assert (again.exit_code, upscales.count) == (0, 2)
    assert "2 skipped, done before" in again.stderr
    # One object, into a folder; another one of the same name, which has another ETag.
    assert batch(f"{bucket}/in/a.jpg", "here").exit_code == 0
    assert size_of("here/a.jpg") == (24, 16)
    obstore.put(store, "in/a.jpg", picture_bytes("JPEG", width=9))
    assert batch(f"{bucket}/in", f"{bucket}/in/out").exit_code == 0
    assert upscales.count == 4
    monkeypatch.setattr("tegula.images.open._HEADROOM", 0)
    obstore.put(store, "many/a.png", bytes(1000))
    done = batch(f"{bucket}/many", "there", "--max-pixels", "1")
    assert done.exit_code == 4
    assert (
        f"{bucket}/many/a.png: The input holds more bytes than an image of 1 pixels" in done.stderr
    )
    refused = batch("s3://no-such-bucket/in", "there")
    assert refused.exit_code == 5
    assert refused.stderr.splitlines()[-1].startswith("tegula: The object store ")


def test_without_obstore_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    done = batch("s3://bucket/in", "out")
    assert done.exit_code == 6
    assert "which needs obstore: pip install 'tegula[objects]'." in done.stderr


class CountedTries:
    """Stands in for the actor that counts; jobs of these numbers were begun before."""

    def __init__(self, counts):
        self.of = self._method(lambda numbers: [counts.get(number, 0) for number in numbers])
        self.begin = self.end = self._method(lambda _: None)

    @staticmethod
    def _method(function):
        return SimpleNamespace(remote=function)


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Return what an actor answers on three pictures, with how often each was begun before."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'tegula[ray]'.")
    from tegula.cli.batch_ray import BatchActor

    monkeypatch.setattr(ray, "get", lambda value: value)
    options = UpscaleOptions(prescaler="lanczos", creativity=0)
    for name in "abc":
        put(tmp_path / f"in/{name}.png")

    def answer(begun):
        request = Request(options, BundleSettings(), Runtime())
        jobs = [
            BatchJob(
                str(tmp_path / "in"), f"{name}.png", 1, "1", f"{name}.png", "png", number=number
            )
            for number, name in enumerate("abc", 1)
        ]
        actor = BatchActor(str(tmp_path / "out"), request, "0", 1, CountedTries(begun))
        (text,) = actor({"jobs": [json.dumps([vars(job) for job in jobs])]})["answer"]
        return json.loads(text)

    return answer


def test_a_picture_that_kills_its_actors_is_given_up_and_its_neighbours_are_not(
    upscales, answers, tmp_path
):
    answer = answers({1: 1, 2: 2})
    assert answer["stopped_by"] is None
    outcomes = {each.job.key: each for each in map(Outcome.from_json, answer["outcomes"])}
    assert upscales.count == 2
    rows = {key: each.row("0") for key, each in outcomes.items()}
    assert [rows[f"{name}.png"]["attempts"] for name in "abc"] == [2, 2, 1]
    assert rows["b.png"]["error"] == {
        "code": "actor_lost",
        "message": f"{tmp_path}/in/b.png: Its actor died while it was worked on, 2 times.",
    }
    assert rows["a.png"]["status"] == rows["c.png"]["status"] == "done"
    assert not outcomes["b.png"].may_succeed


def test_what_no_picture_escapes_comes_back_from_an_actor_as_the_error_that_it_was(
    monkeypatch, answers
):
    from tegula.cli.batch_ray import _error_of

    def load(**_):
        raise MissingWeightsError("The weights are not here.")

    monkeypatch.setattr(upscaler_module.Upscaler, "load", staticmethod(load))
    answer = answers({})
    assert answer["outcomes"] == []
    error = _error_of(Failure(**answer["stopped_by"]))
    assert (type(error), str(error)) == (MissingWeightsError, "The weights are not here.")


def test_a_long_wait_for_the_cluster_is_reported_once(monkeypatch, capsys):
    from tegula.cli.batch_ray import Pool, _waiting_reported

    console = Console()
    with _waiting_reported(console, Pool(1, 1, 2.0, 0.0)):
        pass
    monkeypatch.setattr("tegula.cli.batch_ray._LONG_WAIT_S", 0.0)
    with _waiting_reported(console, Pool(1, 2, 1.0, 0.5)):
        end, said = time.monotonic() + 60, ""
        while not said and time.monotonic() < end:
            said = capsys.readouterr().err
    assert said == (
        "Still waiting for the cluster: an actor takes 1 CPU and 0.5 GPUs, and loads its model "
        "first.\n"
    )


def test_jobs_are_handed_to_a_cluster_once_in_short_streams_and_smaller_groups_at_the_end(
    tmp_path, monkeypatch
):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tegula[ray]'.")
    from tegula.cli.batch_ray import take_jobs

    monkeypatch.setattr("tegula.cli.batch_ray._GROUPS_OF_A_STREAM", 5)
    journal = Journal(tmp_path / "journal")
    for number in range(60):
        job = BatchJob("/in", f"{number}.png", 1, "1", f"{number}.png", "png")
        assert journal.add(job, "0", again=False) == "waiting"
    journal.end_listing()
    streams, sizes = 0, []
    while journal.has_jobs():
        streams += 1
        for group in take_jobs(None, journal=str(tmp_path / "journal"), actors=2, number=streams):
            jobs = [BatchJob(**each) for each in json.loads(group["jobs"][0])]
            sizes.append(len(jobs))
            for job in jobs:
                # Another try comes last.
                again = job.key == "0.png" and job.tries == 0
                journal.end(job, "waiting" if again else "done")
    assert sum(sizes) == 61
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (8, 1)
    assert streams == -(-len(sizes) // 5)
    with pytest.raises(RuntimeError, match="once"):
        next(take_jobs(None, journal=str(tmp_path / "journal"), actors=2, number=streams))
    journal.close()


@pytest.mark.parametrize(
    ("machines", "given", "pool"),
    [
        ([{"CPU": 8.0}], (None, None, None), (1, 1, 8.0, 0.0)),
        ([{"CPU": 8.0}, {"CPU": 4.0}], (None, None, None), (1, 2, 4.0, 0.0)),
        ([{"CPU": 8.0}], ((2, 4), None, None), (2, 4, 2.0, 0.0)),
        ([{"CPU": 2.0}], ((1, 4), None, None), (1, 4, 0.5, 0.0)),
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 2.0}], (None, None, None), (1, 4, 1.0, 1.0)),
        ([{"CPU": 8.0, "GPU": 1.0}], (None, 0.25, 3.0), (1, 4, 3.0, 0.25)),
        ([{"CPU": 8.0}], ((8, 8), 1.0, None), (8, 8, 1.0, 1.0)),  # machines that come later
    ],
)
def test_what_an_actor_takes_of_a_machine(machines, given, pool):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'tegula[ray]'.")
    from tegula.cli.batch_ray import Pool

    found = Pool.of(machines, *given)
    assert (found.least, found.most, found.cpus, found.gpus) == pool


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--actors", "2"], "--actors needs --ray."),
        (["--ray", "--actors", "3..2"], "'3..2' is no number of actors, such as 4 or 1..4."),
    ],
)
def test_options_of_the_cluster_are_checked(words, sentence):
    two_pictures()
    done = batch("in", "out", *words)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_without_ray_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    two_pictures()
    done = batch("in", "out", "--ray")
    assert done.exit_code == 6
    assert "--ray needs Ray: pip install 'tegula[ray]'." in done.stderr


def test_the_line_tells_the_pace_and_the_time_left_once_all_are_listed(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tegula.cli.batch.time.monotonic", lambda: now[0])
    counts = Counts(left=4000)
    pace = Pace(counts)
    now[0] += 10
    counts.done, counts.pixels, counts.failed, counts.skipped = 20, 50e6, 1, 300
    ended = "20 done, 1 failed, 300 skipped, done before"
    assert pace.line() == f"{ended}, 4,000 left so far; 2 pictures/s, 5 megapixels/s"
    counts.is_listed = True
    assert pace.line() == f"{ended}, 4,000 left; 2 pictures/s, 5 megapixels/s; about 33 min left"
    assert pace.summary() == f"{ended}, 4,000 not done; 2 pictures/s, 5 megapixels/s"


COUNT = 100_000


@dataclass(frozen=True)
class Endless(FolderStorage):
    """A storage that lists many files."""

    def entries(self):
        for number in range(COUNT):
            yield Entry(f"{number // 1000:03}/picture-{number:06}.png", 1000, "1")


def test_a_hundred_thousand_pictures_take_no_more_memory_than_few(tmp_path):
    """All keys, or all lines of the manifest, would take above 30 MB."""
    request = Request(UpscaleOptions(), BundleSettings(), Runtime())
    process = psutil.Process()

    def one_run():
        inputs, output = [Input(Endless(tmp_path / "in"))], FolderStorage(tmp_path / "out")
        console = Console(quiet=True)
        batch_run = BatchRun(
            request, inputs, output, Naming(), 0, console, tmp_path / os.urandom(4).hex()
        )
        before = most = process.memory_info().rss
        done = 0
        with closing(batch_run), batch_run.listing():
            for group in batch_run.journal.jobs(500, lambda waiting: waiting, settles=True):
                for job in group:
                    batch_run.record(Outcome(job, 1.0, 20, 20, 7))
                most = max(most, process.memory_info().rss)
                done += len(group)
        return done, batch_run.counts, most - before

    done, counts, growth = one_run()
    assert (done, counts.done, counts.left) == (COUNT, COUNT, 0)
    assert growth < 20_000_000
