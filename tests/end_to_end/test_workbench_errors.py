"""What goes wrong on the pages: each sentence has a way on, and nothing that was chosen is lost."""

from __future__ import annotations

import httpx
import pytest
from api_support import PNG, png
from live_server import Live, live_server
from playwright.sync_api import Page, Route, expect
from workbench import Held, ask, check_accessible, choose, done, needs_browser, open_signed_in

pytestmark = [pytest.mark.slow, needs_browser]
CREATE = "**/v1/models/*/*/predictions"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def form(page: Page, live: Live) -> Page:
    """The form with a picture, and something to lose."""
    open_signed_in(page, live)
    expect(page.locator("#upscale-form")).to_be_visible()
    picture = {"name": "photo.png", "mimeType": "", "buffer": png(30, 20)}
    page.locator("#file").set_input_files([picture])
    page.get_by_label("Prompt", exact=True).fill("a lighthouse")
    expect(page.locator("#go")).to_be_enabled()
    return page


def kept(page: Page) -> None:
    """Nothing that was chosen is lost: it can be sent as it is."""
    expect(page.locator("#field-prompt")).to_have_value("a lighthouse")
    expect(page.locator("#chosen")).to_contain_text("photo.png")
    expect(page.locator("#go")).to_be_enabled()


def answer_once(page: Page, address: str, status: int, detail: str, after: str = "") -> list[str]:
    """Let the first request to an address be refused; returns the methods of all of them."""
    sent: list[str] = []

    def handle(route: Route) -> None:
        sent.append(route.request.method)
        if len(sent) > 1:
            route.continue_()
            return
        headers = {"retry-after": after} if after else {}
        route.fulfill(status=status, json={"detail": detail}, headers=headers)

    page.route(address, handle)
    return sent


def test_a_failed_and_a_cancelled_run_lead_back_to_the_form_with_everything(page: Page, live: Live):
    open_signed_in(page, live, f"/p/{ask(live, 'fail')}")
    expect(page.locator("#error")).to_have_text("The model broke.")
    check_accessible(page)
    page.get_by_role("link", name="Again with other settings").click()
    expect(page.locator("#field-prompt")).to_have_value("fail")
    expect(page.locator("#go")).to_be_enabled()
    page.goto(f"{live.url}/p/{ask(live, 'gated')}")
    page.locator("#cancel").click()
    expect(page.locator("#state")).to_have_text("Cancelled")
    check_accessible(page)
    page.get_by_role("link", name="Again with other settings").click()
    expect(page.locator("#field-prompt")).to_have_value("gated")


def test_a_refused_input_leads_to_the_form_which_is_as_it_was(form: Page):
    answer_once(form, CREATE, 422, "- input.scale: Must be at most 8.")
    form.locator("#go").click()
    expect(form.locator("#page-error")).to_contain_text("input.scale: Must be at most 8.")
    expect(form.locator("#page-error")).to_be_in_viewport()
    form.get_by_role("link", name="Change it on the form.").click()
    kept(form)
    form.locator("#go").click()
    form.wait_for_url("**/p/*")


def test_a_sign_in_that_ended_is_made_good_without_losing_the_form(form: Page, live: Live):
    form.context.clear_cookies()
    for _ in range(2):  # and once more
        form.locator("#go").click()
        expect(form.locator("#page-error")).to_contain_text("not signed in any more")
        form.locator("#page-error").get_by_role("button", name="Sign in").click()
        expect(form.get_by_label("Token")).to_be_focused()
        form.get_by_label("Token").fill(live.token)
        form.get_by_label("Token").press("Enter")
        expect(form.get_by_label("Token")).to_be_hidden()
        expect(form.locator("#page-error")).to_be_empty()
        kept(form)
        signed_in = form.context.cookies()
        form.context.clear_cookies()
    form.context.add_cookies(signed_in)
    form.locator("#go").click()
    form.wait_for_url("**/p/*")


def test_a_page_that_watches_goes_on_once_it_is_signed_in_again(page: Page, live: Live):
    open_signed_in(page, live, f"/p/{ask(live, 'gated')}")
    expect(page.locator("#state")).to_have_text("Running")
    page.context.clear_cookies()
    page.locator("#cancel").click()
    page.locator("#page-error").get_by_role("button", name="Sign in").click()
    page.get_by_label("Token").fill(live.token)
    page.get_by_label("Token").press("Enter")
    live.gate.set()
    expect(page.locator("#state")).to_have_text("Done")
    live.gate.clear()


def test_too_many_requests_are_sent_again_when_the_server_says(form: Page):
    sent = answer_once(form, CREATE, 429, "Request was throttled.", after="6")
    form.locator("#go").click()
    expect(form.locator("#status")).to_have_text("The server is busy; trying again in 6 s …")
    form.wait_for_url("**/p/*")
    assert sent == ["POST", "POST"]


def test_a_long_wait_says_how_long_it_is_and_can_be_stopped(form: Page):
    sent = answer_once(form, CREATE, 429, "Request was throttled.", after="600")
    form.locator("#go").click()
    status = form.locator("#status")
    expect(status).to_have_text("The server is busy; trying again in 10 min …")
    expect(form.locator("#go")).to_be_disabled()
    check_accessible(form)
    form.get_by_role("button", name="Stop").click()
    expect(status).to_have_text("Stopped; no prediction was made.")
    expect(form.get_by_role("button", name="Stop")).to_be_hidden()
    kept(form)
    assert sent == ["POST"]
    choose(form, ("other.png", png(20, 30)))
    expect(status).to_be_empty()
    form.locator("#go").click()
    form.wait_for_url("**/p/*")


def test_what_is_stopped_while_it_is_created_is_cancelled(form: Page, live: Live):
    held = Held(form, CREATE)
    form.locator("#field-prompt").fill("gated")
    form.locator("#go").click()
    held.wait()
    form.get_by_role("button", name="Stop").click()
    held.release()
    expect(form.locator("#status")).to_have_text("Stopped; no prediction was made.")
    headers = {"authorization": f"Bearer {live.token}"}
    last = httpx.get(f"{live.url}/v1/predictions", headers=headers).json()["results"][0]
    assert (last["input"]["prompt"], last["status"]) == ("gated", "canceled")


def test_a_passing_fault_offers_to_try_again_on_the_same_page(form: Page, page: Page, live: Live):
    form.route(CREATE, lambda route: route.abort())
    form.locator("#go").click()
    expect(form.locator("#page-error")).to_contain_text("The server does not answer")
    kept(form)
    form.unroute(CREATE)
    form.get_by_role("button", name="Try again").click()
    form.wait_for_url("**/p/*")
    page.goto(f"{live.url}/p/{ask(live, 'gated')}")
    expect(page.locator("#state")).to_have_text("Running")
    answer_once(page, "**/cancel", 503, "The server is stopping; send the request again.", "1")
    page.locator("#cancel").click()
    expect(page.locator("#page-error")).to_contain_text("The server is stopping")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#state")).to_have_text("Cancelled")


def test_a_page_that_watches_looks_again_after_a_refusal(page: Page, live: Live):
    open_signed_in(page, live, f"/p/{ask(live, 'gated')}")
    expect(page.locator("#state")).to_have_text("Running")
    detail = "The server is stopping; send the request again."
    answer_once(page, "**/v1/web/predictions/*", 503, detail, "6")
    expect(page.locator("#page-error")).to_contain_text("The server is stopping")
    expect(page.locator("#page-error")).to_be_empty()
    live.gate.set()
    expect(page.locator("#state")).to_have_text("Done")
    live.gate.clear()


def test_a_result_that_is_gone_leads_on(page: Page, live: Live):
    made = done(live, PNG, PNG)
    open_signed_in(page, live)
    page.route(
        "**/tiles/**", lambda route: route.fulfill(status=410, json={"detail": "It is gone."})
    )
    page.goto(f"{live.url}/p/{made}")
    expect(page.locator("#output")).to_contain_text("It is gone. Look in your history.")
    expect(page.get_by_role("link", name="Download")).to_have_count(0)
    headers = {"authorization": f"Bearer {live.token}"}
    httpx.delete(
        f"{live.url}/v1/predictions/{made}", headers=headers, timeout=300
    ).raise_for_status()
    page.reload()
    expect(page.locator("#status")).to_contain_text("have been removed")
    check_accessible(page)
    page.get_by_role("link", name="Choose another picture").click()
    expect(page).to_have_url(f"{live.url}/")
