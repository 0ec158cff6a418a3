"""What the store promises, on each database it runs on."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, select, text
from starlette.testclient import TestClient
from store_support import (
    NOON,
    VERSION,
    ask,
    open_store,
)

from tegula.errors import ConflictError, NotFoundError, OptionError, ServiceError
from tegula.server.api.app import create_app
from tegula.server.api.service import RunTimeEstimates
from tegula.server.background import Sweeper
from tegula.server.db import utc_now
from tegula.server.queue import Report
from tegula.server.settings import ServerSettings
from tegula.server.store import Store
from tegula.server.tables import Base, Deployment, ModelTotal, State, UserModel, UserVersion
from tegula.server.webhooks import Outcome


def test_an_accepted_prediction_is_got_as_it_was_made(store):
    made = ask(store, input={"image": "https://example.com/a.png", "ünï": [1, None, 2.5]})
    assert store.predictions.get(made.id) == made
    assert made.status is State.STARTING


def test_what_the_store_hands_out_is_a_copy_that_nobody_changes(store):
    made = ask(store, webhook="https://example.com/")
    for row in (made, store.predictions.get(made.id), store.accounts.get(made.account_id)):
        with pytest.raises(AttributeError, match="copy"):
            row.id = "another"
        assert repr(row)  # every field is there, though its session is closed


def test_accounts_do_not_see_each_other(store):
    made, other = ask(store), store.accounts.ensure("grace")
    with pytest.raises(NotFoundError):
        store.predictions.get(made.id, other.id)
    with pytest.raises(NotFoundError):
        store.predictions.cancel(made.id, other.id)
    assert store.predictions.page(other.id).items == ()


def test_the_tables_are_those_that_the_migrations_make(store):
    with store.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


MANY = "predictions|usage|webhooks|files|events|idempotency_keys"
"""Tables that grow with every prediction."""


@contextmanager
def planned(store):
    """Collect the plans that SQLite makes for all statements that are run meanwhile."""
    plans = []

    def note(connection, _cursor, statement, parameters, *_):
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            steps = connection.connection.dbapi_connection.execute(
                f"EXPLAIN QUERY PLAN {statement}", parameters
            )
            plans.append((statement, [row[3] for row in steps]))

    event.listen(store.database.engine, "before_cursor_execute", note)
    yield plans
    event.remove(store.database.engine, "before_cursor_execute", note)


def test_nothing_that_is_asked_often_looks_at_every_past_prediction(tmp_path, clock):
    """Of 500,000 of them each scan takes up to a second, most of it under the lock to write."""
    store = open_store(tmp_path, clock, history_seconds=9000)
    ada = store.accounts.ensure("ada").id
    store.deployments.create(
        Deployment("ada", "d", ada, 1, "tegula/upscale", "1", "cpu", 0, 1, NOON)
    )
    first = ask(store, webhook="https://example.com/", deployment="ada/d")
    clock.turn(1)
    other = ask(store)
    app = create_app(store)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client, planned(store) as plans:
        store.predictions.share(other.id)
        claimed = store.queue.claim("worker", [VERSION])
        store.queue.claim_fetch("worker")
        store.queue.start(claimed.id, claimed.attempt)
        made = store.files.keep(ada, "o.png", b"out", prediction_id=claimed.id)
        store.queue.succeed(claimed.id, claimed.attempt, Report("a\n", (made.id,)))
        store.queue.rescue()
        store.queue.expire()
        store.predictions.ahead_of(other)
        token = store.accounts.create_token(ada, "t")[1]
        headers = {"authorization": f"Bearer {token}"}
        for path in (
            "metrics", "readyz", "v1/models/tegula/upscale", "v1/models/tegula/upscale/examples",
            "v1/predictions", "v1/files", "v1/webhooks/deliveries", "v1/web/history",
            "v1/web/history?status=failed&model=a/b", "v1/web/history?removed=1",
            f"v1/predictions/{first.id}",
        ):  # fmt: skip
            assert client.get(f"/{path}", headers=headers).status_code == 200, path
        store.webhooks.next_due()
        for message in store.webhooks.due(9, timedelta(), ["example.org"]):
            store.webhooks.finish_attempt(message.id, Outcome("delivered", clock()))
        store.predictions.last_events([first.id])
        store.predictions.events(first.id)
        RunTimeEstimates(store.usage).get("tegula/upscale")
        clock.turn(10_000)
        swept = Sweeper(store).sweep()
    assert swept.predictions == 2  # the data of the first, and then itself
    assert len(plans) > 60
    for statement, steps in plans:
        assert not [step for step in steps if re.match(f"SCAN ({MANY})", step)], (statement, steps)
        # Nearly all have none, which SQLite takes for a rare find.
        shared = [step for step in steps if "share_token=?" in step]
        assert not shared or "share_token IS NULL" not in statement, (statement, steps)
        # Of those that are not finished there are few.
        if re.search(f"FROM ({MANY})", statement) and "status IN" not in statement:
            sorting = "USE TEMP B-TREE FOR ORDER BY" in steps
            assert not sorting or "predictions.status = " in statement, (statement, steps)
    store.close()


def test_totals_stay_though_predictions_are_removed_for_good(store, clock, run):
    object.__setattr__(store.settings, "history_seconds", 100)
    object.__setattr__(store.settings, "retention_seconds", 0)
    settings = ({"webhook": "https://example.com/"}, {}, {}, {"model": "a/b"})
    kept, shared, *_ = asked = [(ask(store, **given), clock.turn(0.1))[0] for given in settings]
    store.predictions.share(shared.id)
    for made in asked:
        name, attempt = run()
        assert name == made.id
        store.queue.report(name, attempt, Report("line\n"))
        clock.turn(2)
        store.queue.succeed(name, attempt)
    waiting = ask(store, model="a/b")
    sweep = Sweeper(store).sweep

    def totals():
        counts = store.predictions.run_counts(["a/b", "tegula/upscale", "c/d"])
        return counts, store.usage.totals(), store.usage.mean_seconds()

    before = totals()
    assert before == (
        {"tegula/upscale": 3, "a/b": 2}, (4, 8.0), {"tegula/upscale": 2.0, "a/b": 2.0}
    )  # fmt: skip
    assert sweep().predictions == 0
    clock.turn(101)
    assert sweep().predictions == 2  # a webhook of the first is still to be sent
    for message in store.webhooks.due(9, timedelta()):
        store.webhooks.finish_attempt(message.id, Outcome("delivered", clock()))
    assert sweep().predictions == 1
    assert {one.id for one in store.predictions.page(None).items} == {shared.id, waiting.id}
    assert store.webhooks.messages(kept.id) == ()
    with store.database.read() as session:
        assert len(session.scalars(select(ModelTotal)).all()) == 2
    assert totals() == before


@pytest.mark.parametrize("how", ["remove", "delete"])
def test_what_a_late_worker_keeps_of_a_removed_prediction_is_due_at_once(store, clock, run, how):
    ask(store)
    name, attempt = run()
    early = store.files.keep(store.accounts.ensure("ada").id, "a.png", b"a", prediction_id=name)
    assert early.expires_at is None
    store.queue.succeed(name, attempt)
    if how == "remove":
        store.predictions.remove(name)
    else:
        object.__setattr__(store.settings, "history_seconds", 10)
        clock.turn(11)
        assert Sweeper(store).sweep().predictions == 1
    late = store.files.keep(early.account_id, "b.png", b"b", prediction_id=name)
    for gone in (early, late):
        with pytest.raises(NotFoundError):
            store.files.get(gone.id)
    assert Sweeper(store).sweep().files == 1


def test_a_database_is_opened_again_with_what_was_in_it(store, tmp_path, database_url):
    made = ask(store)
    links = store.links
    again = open_store(tmp_path, database_url=database_url)
    assert again.predictions.get(made.id) == made
    assert again.links == links
    again.close()


def test_many_may_open_a_new_database_at_once(tmp_path, empty_database_url):
    # Not by ``open_store``, which begins with tables that are there.
    settings = ServerSettings(folder=tmp_path / "new", database_url=empty_database_url)
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: Store.open(settings, clock=utc_now), range(4)))
    assert len({store.links.stream("x") for store in stores}) == 1
    for store in stores:
        store.close()


def test_a_server_with_another_folder_than_the_files_of_the_database_does_not_start(
    tmp_path, database_url
):
    open_store(tmp_path / "one", database_url=database_url).close()
    open_store(tmp_path / "one", database_url=database_url).close()
    shared = database_url or f"sqlite:///{tmp_path / 'one' / 'tegula.sqlite3'}"
    with pytest.raises(ServiceError, match="another folder"):
        open_store(tmp_path / "two", database_url=shared)
    # A folder that was moved is still the same one.
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = database_url or f"sqlite:///{tmp_path / 'moved' / 'tegula.sqlite3'}"
    open_store(tmp_path / "moved", database_url=moved).close()


def test_pages_lead_through_the_list_and_back(store, clock):
    made = []
    for number in range(7):
        made.append(ask(store).id)
        clock.turn(number % 2)  # some were made at the same moment
    newest = [each.id for each in store.predictions.page(None).items]
    assert sorted(newest) == sorted(made)
    pages, cursor = [], None
    for _ in range(4):
        pages.append(store.predictions.page(None, cursor=cursor, limit=2))
        cursor = pages[-1].next
    assert [each.id for page in pages for each in page.items] == newest
    assert (pages[0].previous, pages[-1].next) == (None, None)
    back = store.predictions.page(None, cursor=pages[2].previous, limit=2)
    assert back.items == pages[1].items
    assert store.predictions.page(None, cursor=back.previous, limit=2).previous is None


def test_a_list_is_narrowed_by_time_and_source(store, clock):
    ask(store)
    clock.turn(10)
    middle, at = ask(store, source="web"), clock.now
    clock.turn(10)
    ask(store)
    page = store.predictions.page(None, created_after=at, created_before=clock.now)
    assert [each.id for each in page.items] == [middle.id]
    assert [each.id for each in store.predictions.page(None, source="web").items] == [middle.id]


@pytest.mark.parametrize("cursor", ["x", "bnVsbA", "WyJvbGRlciIsMSwyXQ", "%00", "W10" * 500])
def test_a_cursor_of_somebody_elses_making_is_refused(store, cursor):
    with pytest.raises(OptionError):
        store.predictions.page(None, cursor=cursor)


def test_a_shared_prediction_is_found_by_its_token_until_it_is_taken_back(store):
    shared = store.predictions.share(ask(store).id)
    assert store.predictions.shared(shared.share_token) == shared
    assert store.predictions.share(shared.id).share_token == shared.share_token
    store.predictions.unshare(shared.id)
    with pytest.raises(NotFoundError):
        store.predictions.shared(shared.share_token)


def test_a_token_opens_its_account_until_it_is_revoked(store):
    account = store.accounts.ensure("ada")
    token, plain = store.accounts.create_token(account.id, "laptop")
    assert store.accounts.authenticate(plain)[0] == account
    assert store.accounts.authenticate(plain[:-1]) is None
    with pytest.raises(ConflictError):
        store.accounts.create_token(account.id, "laptop")
    assert store.accounts.revoke(token.name)
    assert store.accounts.authenticate(plain) is None


def test_a_token_is_kept_nowhere_in_the_clear(store):
    _, plain = store.accounts.create_token(store.accounts.ensure("ada").id, "laptop")
    with store.database.read() as connection:
        (row,) = connection.execute(text("SELECT * FROM tokens")).all()
    assert plain[:-4] not in str(row)


def test_a_release_of_a_deployment_has_the_next_number(store, clock):
    account = store.accounts.ensure("ada")
    made = Deployment("ada", "small", account.id, 1, "m/n", VERSION, "cpu", 0, 1, NOON)
    store.deployments.create(made)
    with pytest.raises(ConflictError):
        store.deployments.create(made)
    clock.turn(5)
    after = store.deployments.update(made)
    assert store.deployments.get("ada", "small") == after
    assert (after.number, after.created_at) == (2, clock.now)
    store.deployments.delete("ada", "small")
    with pytest.raises(NotFoundError):
        store.deployments.delete("ada", "small")


def test_private_models_are_seen_by_their_owner_alone(store):
    ada, grace = store.accounts.ensure("ada"), store.accounts.ensure("grace")
    mine = store.models.create(UserModel("ada", "mine", ada.id, "private", "cpu", NOON))
    assert store.models.all(ada.id) == ((mine, ()),)
    assert store.models.all(grace.id) == store.models.all() == ()
    assert store.models.named("ada", "mine", grace.id) is None
    assert store.models.of_version("ab" * 8, grace.id) == ()


def test_a_model_is_deleted_after_its_versions(store):
    account = store.accounts.ensure("ada")
    store.models.create(UserModel("ada", "mine", account.id, "public", "cpu", NOON))
    version = UserVersion("ef" * 32, "ada/mine", "tegula/upscale", "1", {"scale": 4}, NOON)
    store.models.add_version(version)
    with pytest.raises(ConflictError):
        store.models.delete("ada", "mine")
    store.models.delete_version(version.id)
    store.models.delete("ada", "mine")
    assert store.models.get("ada", "mine") is None


def test_listeners_hear_of_every_change_until_they_leave(store, run):
    heard = []
    leave = store.pubsub.subscribe(heard.append)
    made = ask(store)
    store.queue.succeed(*run())
    assert set(heard) == {made.id}
    before = len(heard)
    leave()
    ask(store)
    assert len(heard) == before
