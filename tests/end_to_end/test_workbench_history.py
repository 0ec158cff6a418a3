"""The history: thumbnails, names, filters and removal, across tabs and restarts."""

from __future__ import annotations

import re

import pytest
from live_server import live_server
from playwright.sync_api import Page, expect
from serve_support import free_port
from workbench import (
    Held,
    ask,
    check_accessible,
    done,
    encoded,
    needs_browser,
    open_signed_in,
    pattern,
)

from tegula.server.tables import State

pytestmark = [pytest.mark.slow, needs_browser]


def test_the_history_outlives_a_restart_and_tabs_tell_each_other(page: Page, tmp_path):
    port = free_port()
    with live_server(tmp_path, port=port) as live:
        small, large = pattern(40, 30), pattern(80, 60)
        for name in ("holiday.png", "cat.png"):
            done(live, encoded(small), encoded(large), name)
        failed = ask(live, "fail")
        open_signed_in(page, live, "/history")
        cards = page.locator("#predictions > li")
        expect(cards).to_have_count(3)
        expect(cards.nth(1).locator("img")).to_have_js_property("naturalWidth", 80)
        expect(page.locator("#retention")).to_contain_text("removed 60 min after it is done")
        expect(cards.nth(1)).to_contain_text(re.compile(r"its data goes in (60|5\d) min"))
        expect(cards.first).to_contain_text("The model broke.")
        check_accessible(page)
        page.get_by_label("State").select_option("failed")
        expect(cards).to_have_count(1)
        assert failed in str(cards.first.get_by_role("link").get_attribute("href"))
        page.get_by_label("State").select_option("")
        page.get_by_label("Name").fill("HOLI")
        expect(cards).to_have_count(1)
        expect(cards.first).to_contain_text("holiday.png")
    with live_server(tmp_path, port=port):
        page.reload()
        cards = page.locator("#predictions > li")
        expect(cards).to_have_count(3)
        other = page.context.new_page()
        other.goto(page.url)
        expect(other.locator("#predictions > li")).to_have_count(3)
        page.once("dialog", lambda dialog: dialog.accept())
        page.get_by_role("button", name="Remove cat.png").click()
        expect(cards).to_have_count(2)
        expect(other.locator("#predictions > li")).to_have_count(2)
        page.get_by_label("also those whose data is gone").check()
        expect(cards).to_have_count(3)
        expect(page.locator(".gone")).to_have_text("removed")
        page.get_by_role("link", name="holiday.png").click()
        expect(page.locator(".viewer")).to_be_visible()


def test_what_ends_while_the_history_opens_is_in_it(page: Page, tmp_path):
    with live_server(tmp_path) as live:
        gated = ask(live, "gated")
        active = Held(page, re.compile(r"/v1/web/history\?status=active"))
        open_signed_in(page, live, "/history")
        active.wait()
        live.gate.set()
        while live.store.predictions.get(gated).status is not State.SUCCEEDED:
            page.wait_for_timeout(20)
        active.release()
        cards = page.locator("#predictions > li")
        expect(cards).to_have_count(1)
        expect(page.locator("#running")).to_be_hidden()
