"""What all pages share: signing in once, the links between them, and what axe says of them."""

from __future__ import annotations

import pytest
from live_server import Live, live_server
from playwright.sync_api import Page, Response, expect
from workbench import check_accessible, findings, needs_browser, open_signed_in

pytestmark = [pytest.mark.slow, needs_browser]
FIRST_LOAD_BYTES = 150_000


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def test_a_browser_signs_in_once_for_all_tabs_until_it_signs_out(page: Page, live: Live):
    page.goto(live.url)
    page.get_by_label("Token").fill("tgl_nonsense")
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("alert").filter(has_text="does not know that token")).to_be_visible()
    page.get_by_label("Token").fill(live.token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#upscale-form")).to_be_visible()
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert live.token not in cookie["value"]
    assert page.evaluate("document.cookie + Object.values({...sessionStorage})") == ""
    other = page.context.new_page()
    other.goto(f"{live.url}/history")
    expect(other.get_by_role("button", name="Sign out")).to_be_visible()
    other.get_by_role("button", name="Sign out").click()
    expect(other.get_by_label("Token")).to_be_visible()
    assert page.context.cookies() == []
    page.reload()
    expect(page.get_by_label("Token")).to_be_visible()


def test_the_link_of_the_demo_signs_in_and_further_tabs_open_without_asking(page: Page, live: Live):
    open_signed_in(page, live)
    assert page.url == f"{live.url}/"
    other = page.context.new_page()
    other.goto(live.url)
    expect(other.locator("#upscale-form")).to_be_visible()
    expect(other.get_by_label("Token")).to_be_hidden()


def test_the_links_lead_from_every_page_to_every_other(page: Page, live: Live):
    open_signed_in(page, live)
    for name, address in (("History", "history"), ("Models", "catalog"), ("API", "docs")):
        page.get_by_role("navigation", name="Pages").get_by_role("link", name=name).click()
        expect(page).to_have_url(f"{live.url}/{address}")
        expect(page.locator("nav a[aria-current=page]")).to_have_text(name)
    page.goto(f"{live.url}/p/abc")
    page.get_by_role("navigation", name="Pages").get_by_role("link", name="Home").click()
    expect(page).to_have_url(f"{live.url}/")


@pytest.mark.parametrize("path", ["/", "/history", "/catalog", "/docs", "/p/abc"])
def test_a_page_loads_little_is_accessible_and_complains_of_nothing(
    page: Page, live: Live, path: str
):
    page.goto(f"{live.url}{path}")
    expect(page.locator("h1")).to_be_visible()
    if path != "/docs":
        expect(page.get_by_label("Token")).to_be_visible()
        check_accessible(page)
    open_signed_in(page, live)
    page.wait_for_load_state("networkidle")
    loaded: list[Response] = []

    def hear(answer: Response) -> None:
        loaded.append(answer)

    page.on("response", hear)
    network = page.context.new_cdp_session(page)
    network.send("Network.setCacheDisabled", {"cacheDisabled": True})
    page.goto(f"{live.url}{path}", wait_until="networkidle")
    page.remove_listener("response", hear)
    network.detach()
    files = [one for one in loaded if not one.url.startswith(("data:", "blob:"))]
    assert all(one.url.startswith(live.url) for one in files)
    texts = [one for one in files if "image/" not in one.headers.get("content-type", "")]
    size = sum(len(one.body()) for one in texts)
    print(f"{path}: first load {size} bytes")  # noqa: T201
    assert size < FIRST_LOAD_BYTES
    if path == "/docs":  # which is long, and all of one kind
        assert findings(page) == []
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 360, "height": 900})
        assert findings(page, ["color-contrast", "scrollable-region-focusable"]) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        hidden = "all => all.filter((one) => one.scrollWidth > one.clientWidth).length"
        assert page.locator(".docs .scroll").evaluate_all(hidden) == 0
    else:
        check_accessible(page)


def test_an_address_that_leads_nowhere_says_so_and_offers_a_link(page: Page, live: Live):
    open_signed_in(page, live, "/p/abc")
    expect(page.locator("#page-error")).to_contain_text("could not be found")
    page.get_by_role("link", name="Look in your history.").click()
    expect(page).to_have_url(f"{live.url}/history")
