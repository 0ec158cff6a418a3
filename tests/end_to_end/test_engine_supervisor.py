"""The dispatcher: from accepted predictions to recorded ends, over engines that fail."""

from __future__ import annotations

import time

import pytest
from engine_support import HereEngine, ended, supervising, until
from sqlalchemy.exc import OperationalError
from store_support import NOON, VERSION, ask, open_store

from tegula.catalog import find
from tegula.errors import StorageError, UnknownModelError
from tegula.server.addresses import Policy
from tegula.server.blobs import FolderBlobs
from tegula.server.db import utc_now
from tegula.server.engine import progress_line
from tegula.server.fetch import Fetcher
from tegula.server.predictions import NewPrediction
from tegula.server.runner import LocalEngine, RunnerSpec, Timeouts
from tegula.server.supervisor import Supervisor
from tegula.server.tables import FILE_KEY, Prediction, State, UserModel, UserVersion
from tegula.server.work import CatalogResolver, InputFiles, ResolvedVersion


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path, utc_now, lease_seconds=60.0)
    yield opened
    opened.close()


@pytest.fixture
def supervise(store):
    fetcher = Fetcher(Policy())
    inputs = InputFiles(store.files, fetcher, 1000, 60.0)
    with supervising() as start:
        yield lambda *engines, resolver=lambda _: ResolvedVersion("ab", ("image",), True): start(
            store, engines, resolver, inputs
        )


def test_a_prediction_is_run_and_everything_recorded(store, supervise):
    supervise(HereEngine())
    done = ended(store, ask(store).id)
    assert done.status is State.SUCCEEDED
    assert " 50%|#####     | 50/100 [" in done.logs
    assert "100%|##########| 100/100" in done.logs
    (file,) = done.output
    kept = store.files.get(file[FILE_KEY])
    assert (kept.prediction_id, kept.content_type) == (done.id, "image/png")
    assert store.files.path(kept).read_bytes().endswith(done.id.encode())
    until(lambda: not list((store.settings.folder / "spool").iterdir()))


def test_the_last_output_is_recorded_together_with_the_success(store, supervise):
    seen = set()

    def look(name):
        now = store.predictions.get(name)
        seen.add((now.status, now.output is not None))

    store.pubsub.subscribe(look)
    supervise(HereEngine())
    ended(store, ask(store).id)
    assert (State.PROCESSING, False) in seen
    assert (State.PROCESSING, True) not in seen


def test_a_model_of_one_picture_has_no_list(store, supervise):
    supervise(HereEngine(), resolver=lambda _: ResolvedVersion("ab", (), False))
    assert ended(store, ask(store).id).output["name"] == "out-0.png"


def test_a_job_names_the_bundle_of_its_deployment_or_else_of_its_model(tmp_path):
    bundles = {"ada/portraits": {"bundle": "painted"}, "acme/own": {"vae": "mse"}}
    store = open_store(tmp_path / "own", utc_now, bundles=bundles)
    engine = HereEngine()
    supervisor = Supervisor(
        store,
        [engine],
        lambda _: ResolvedVersion("ab", (), True),
        InputFiles(store.files, Fetcher(Policy()), 1000, 60.0),
    )
    supervisor.start()
    wanted = [
        {"deployment": "ada/portraits", "model": "acme/own"},
        {"model": "acme/own"},
        {"deployment": "ada/others"},
        {},
    ]
    for values in wanted:
        ended(store, ask(store, **values).id)
    supervisor.stop()
    store.close()
    assert [job.bundle for job in engine.ran] == ["ada/portraits", "acme/own", "", ""]


def test_cancelling_a_running_prediction_frees_the_engine(store, supervise):
    supervise(HereEngine())
    name = ask(store, input={"do": "wait"}).id
    until(lambda: store.predictions.get(name).status is State.PROCESSING)
    assert store.predictions.cancel(name).status is State.CANCELED
    assert ended(store, ask(store).id).status is State.SUCCEEDED


def test_an_error_of_the_model_fails_the_prediction_with_its_words(store, supervise):
    supervise(HereEngine())
    failed = ended(store, ask(store, input={"do": "refuse"}).id)
    assert (failed.status, failed.error) == (State.FAILED, "The input is no image.")


def test_an_input_out_of_reach_fails_the_prediction_before_any_model_runs(store, supervise):
    engine = HereEngine()
    supervise(engine)
    failed = ended(store, ask(store, input={"image": "http://127.0.0.1:80/x"}).id)
    assert failed.status is State.FAILED
    assert failed.error.startswith("image cannot be fetched")
    assert engine.ran == []


def test_a_version_that_is_gone_fails_the_prediction(store, supervise):
    def gone(_):
        raise UnknownModelError("No model has this version.")

    supervise(HereEngine(), resolver=gone)
    assert ended(store, ask(store).id).error == "No model has this version."


def test_a_version_of_a_users_model_resolves_to_ours(store):
    from tegula.catalog import Catalog

    ours = find("tegula/upscale")
    ada = store.accounts.ensure("ada")
    store.models.create(UserModel("ada", "mine", ada.id, "public", "cpu", utc_now()))
    store.models.add_version(
        UserVersion("ef" * 32, "ada/mine", ours.name, ours.label, {"scale": 4}, utc_now())
    )
    resolve = CatalogResolver(Catalog(ours.weights), store.models)
    made = ask(store, version="ef" * 32)
    assert resolve(made).version == ours.id
    assert "image" in resolve(made).files
    with pytest.raises(UnknownModelError):
        resolve(ask(store, version=VERSION))


def test_stopping_hands_back_what_runs_and_loses_nothing(store, supervise):
    supervisor = supervise(HereEngine())
    name = ask(store, input={"do": "wait"}).id
    until(lambda: store.predictions.get(name).status is State.PROCESSING)
    assert supervisor.stop(grace=0.05) is False
    back = store.predictions.get(name)
    assert (back.status, back.losses, back.worker) == (State.STARTING, 0, None)


def test_stopping_lets_finish_what_ends_in_time(store, supervise):
    supervisor = supervise(HereEngine())
    name = ask(store).id
    until(lambda: store.predictions.get(name).attempt)
    assert supervisor.stop(grace=300) is True
    assert store.predictions.get(name).status is State.SUCCEEDED


def test_what_a_dead_server_left_is_run_by_the_next(store, supervise):
    name = ask(store).id
    store.queue.claim("a server that is gone")
    with store.database.write() as session:
        session.get_one(Prediction, name).lease_until = NOON
    supervise(HereEngine())
    done = ended(store, name)
    assert (done.status, done.attempt, done.losses) == (State.SUCCEEDED, 2, 1)


@pytest.mark.parametrize(
    ("error", "losses"),
    [(ZeroDivisionError("a fault of ours"), 1), (OperationalError("SELECT 1", {}, OSError()), 0)],
    ids=["any", "database"],
)
def test_a_run_that_meets_an_error_of_ours_begins_again_before_its_lease_is_over(
    store, supervise, error, losses
):
    def stumble_once(_, errors=[error]):  # noqa: B006
        if errors:
            raise errors.pop()
        return ResolvedVersion("ab", (), True)

    began = time.monotonic()
    supervise(HereEngine(), resolver=stumble_once)
    done = ended(store, ask(store).id)
    assert (done.status, done.attempt, done.losses) == (State.SUCCEEDED, 2, losses)
    assert time.monotonic() - began < store.settings.lease_seconds


def test_engines_share_the_work(store, supervise):
    engines = [HereEngine(), HereEngine()]
    names = [ask(store, input={"do": "wait"}).id for _ in range(2)]
    supervise(*engines)
    until(lambda: all(store.predictions.get(n).status is State.PROCESSING for n in names))
    assert [len(engine.ran) for engine in engines] == [1, 1]
    for name in names:
        store.predictions.cancel(name)


def test_an_engine_that_nobody_uses_is_unloaded(tmp_path, supervise, store):
    object.__setattr__(store.settings, "idle_unload_seconds", 0.01)
    engine = HereEngine()
    supervise(engine)
    ended(store, ask(store).id)
    until(lambda: engine.unloads)


def test_a_deployment_may_keep_its_model_loaded(store, supervise):
    from tegula.server.tables import Deployment

    ada = store.accounts.ensure("ada")
    store.deployments.create(
        Deployment("ada", "warm", ada.id, 1, "m/n", VERSION, "cpu", 1, 2, utc_now())
    )
    object.__setattr__(store.settings, "idle_unload_seconds", 0.01)
    engine = HereEngine()
    supervise(engine)
    until(lambda: engine.loads)
    assert engine.unloads == 0


def test_a_run_that_takes_too_long_is_given_up(store, supervise):
    object.__setattr__(store.settings, "run_seconds", 0.1)
    supervise(HereEngine())
    failed = ended(store, ask(store, input={"do": "wait"}).id)
    assert failed.status is State.FAILED
    assert "ran for more than" in failed.error


def test_a_full_disk_fails_the_prediction_and_others_go_on(store, supervise, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    supervise(HereEngine())
    with monkeypatch.context() as patched:
        patched.setattr("tegula.server.blobs.os.fsync", full)
        failed = ended(store, ask(store).id)
    assert (failed.status, failed.output) == (State.FAILED, None)
    assert "No space left" in failed.error
    assert ended(store, ask(store).id).status is State.SUCCEEDED


def test_a_disk_with_no_room_for_a_run_fails_the_prediction(store, supervise, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    supervise(HereEngine())
    with monkeypatch.context() as patched:
        patched.setattr("tegula.server.work.tempfile.mkdtemp", full)
        failed = ended(store, ask(store).id)
    assert failed.error == "The disk of the server is full; try again later."
    assert ended(store, ask(store).id).status is State.SUCCEEDED


def test_an_object_store_that_is_away_fails_the_prediction_and_others_go_on(
    store, supervise, monkeypatch
):
    def away(*_):
        raise StorageError("The object store answers with 503; try again later.")

    supervise(HereEngine())
    with monkeypatch.context() as patched:
        patched.setattr(FolderBlobs, "put", away)
        failed = ended(store, ask(store).id)
    assert (failed.status, failed.output) == (State.FAILED, None)
    assert failed.error == "The object store answers with 503; try again later."
    assert ended(store, ask(store).id).status is State.SUCCEEDED


@pytest.fixture
def process():
    return LocalEngine(RunnerSpec("engine_support:open_runner", {}), "cpu", Timeouts(300, 300, 1))


def test_a_death_is_survived_once(store, supervise, process):
    supervise(process)
    done = ended(store, ask(store, input={"do": "die_once"}).id)
    assert (done.status, done.losses, done.attempt) == (State.SUCCEEDED, 1, 2)
    assert len(done.output) == 1


def test_the_second_death_fails_the_prediction_and_others_go_on(store, supervise, process):
    supervise(process)
    failed = ended(store, ask(store, input={"do": "die"}).id)
    assert (failed.status, failed.losses) == (State.FAILED, 2)
    assert "signal 9" in failed.error
    assert ended(store, ask(store).id).status is State.SUCCEEDED


@pytest.mark.parametrize(
    ("fraction", "spent", "left", "line"),
    [
        (0, 0, None, "  0%|          | 0/100 [00:00<?]"),
        (0.999, 61.7, 3700, " 99%|######### | 99/100 [01:01<1:01:40]"),
        (1, 5, 0, "100%|##########| 100/100 [00:05<00:00]"),
    ],
)
def test_progress_lines_have_the_form_that_clients_parse(fraction, spent, left, line):
    import re

    assert progress_line(fraction, spent, left) == line
    match = re.match(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)\/(\d+)", line)
    assert match.groups() == (str(int(fraction * 100)), str(int(fraction * 100)), "100")


@pytest.mark.slow
def test_a_picture_is_upscaled_by_the_packaged_model(store, supervise):
    import io

    from PIL import Image

    from tegula.catalog import Catalog
    from tegula.server.files import encode_data_uri
    from tegula.server.supervisor import open_engines, open_supervisor

    version = find("tegula/upscale")
    catalog = Catalog(version.weights)
    picture = io.BytesIO()
    Image.radial_gradient("L").resize((72, 64)).convert("RGB").save(picture, "PNG")
    ada = store.accounts.ensure("ada")
    uri = encode_data_uri(picture.getvalue(), "image/png")
    values = store.files.adopt({"image": uri}, ada.id, ["image"])
    engines = open_engines(store.settings, catalog, ["cpu"])
    supervisor = open_supervisor(store, catalog, engines, Fetcher())
    supervisor.start()
    new = NewPrediction(ada.id, version.name, version.id, values)
    done = ended(store, store.predictions.create(new).prediction.id)
    supervisor.stop()
    assert done.status is State.SUCCEEDED, done.error
    with Image.open(store.files.path(store.files.get(done.output[FILE_KEY]))) as large:
        assert large.size == (144, 128)
