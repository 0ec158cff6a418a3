"""The pages in a real browser, over a live server with an engine of a few lines."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from api_support import BATOU, DATA_URI, PNG, png
from browser_support import Browser, find_browser, opened_browser
from live_server import Live, live_server, proxy
from serve_support import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_browser() is None,
        reason="no Chromium is installed; install one, or name it in TEGULA_BROWSER",
    ),
]
DONE = "document.getElementById('state').textContent === 'Done'"
DRAWN = "document.querySelector('.viewer').dataset.pending === '0'"
PERCENT = "/\\d %/.test(document.getElementById('status').textContent)"


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    program = find_browser()
    assert program is not None
    with opened_browser(program, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(tab: Browser, live: Live):
    """The tab, signed out; a page that complains fails the test."""
    tab.resize(1100)
    tab.open(f"{live.url}/docs")
    tab.until("location.pathname === '/docs' && document.readyState === 'complete'")
    tab.call("Network.clearBrowserCookies")
    tab.said.clear()
    tab.requested.clear()
    yield tab
    assert [text for text in tab.said if "status of 40" not in text] == []


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(png(30, 20))
    return path


def predict(live: Live, model: str = "tegula/upscale", **inputs) -> str:
    """Ask for a prediction as a program would; return its id."""
    body = {"version": model, "input": {"image": DATA_URI, **inputs}}
    headers = {"authorization": f"Bearer {live.token}"}
    answer = httpx.post(f"{live.url}/v1/predictions", json=body, headers=headers, timeout=300)
    return answer.json()["id"]


def sign_in(browser: Browser, live: Live) -> None:
    """Paste the token where the page asks for it, as it does but once a browser."""
    browser.until(
        "!document.getElementById('token-form').hidden"
        " || !document.getElementById('sign-out').hidden"
    )
    if browser.run("document.getElementById('token-form').hidden"):
        return
    browser.run(f"document.getElementById('token').value = {live.token!r}")
    browser.run("document.getElementById('token-form').requestSubmit()")


def shown(browser: Browser, live: Live, prediction_id: str) -> None:
    browser.open(f"{live.url}/p/{prediction_id}")
    sign_in(browser, live)
    browser.until("!document.getElementById('shown').hidden")


def arrived(path: Path) -> Path:
    """The path, once a download is complete there."""
    while not path.exists():
        time.sleep(0.05)
    return path


def test_a_photograph_is_chosen_watched_compared_and_saved(
    browser: Browser, live: Live, photo, tmp_path
):
    browser.open(f"{live.url}/")
    sign_in(browser, live)
    browser.until("!document.getElementById('upscale-form').hidden")
    assert browser.run("document.getElementById('go').disabled")
    browser.choose_file("#file", photo)
    browser.until("/60 . 40/.test(document.getElementById('result-size').textContent)")
    browser.run("document.querySelector('[data-scale=\"4\"]').click()")
    browser.run("document.querySelector('[name=preset][value=fast]').click()")
    browser.run("document.getElementById('field-prompt').value = 'gated'")
    browser.run("document.getElementById('go').click()")
    browser.until(PERCENT)
    live.gate.set()
    browser.until(DONE)
    live.gate.clear()
    browser.until(DRAWN)
    made = browser.run("location.pathname.split('/').pop()")
    kept = live.store.predictions.get(made)
    assert (kept.input["scale"], kept.input["preset"]) == (4, "fast")
    assert kept.source == "web"
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('a[download]').click()")
    assert arrived(tmp_path / f"{made}.png").read_bytes() == PNG


def test_a_dropped_file_is_taken_and_one_that_is_no_picture_is_not(browser: Browser, live: Live):
    browser.open(f"{live.url}/")
    sign_in(browser, live)
    browser.until("!document.getElementById('upscale-form').hidden")
    drop = """(() => {{
      const all = new DataTransfer();
      all.items.add(new File(["{text}"], "{name}", {{ type: "{kind}" }}));
      document.dispatchEvent(new DragEvent("drop", {{ dataTransfer: all, cancelable: true }}));
    }})()"""
    browser.run(drop.format(name="letter.txt", kind="text/plain", text="Dear Ana"))
    browser.until(
        "document.getElementById('problem').textContent.startsWith('letter.txt is not a picture')"
    )
    assert browser.run("document.getElementById('go').disabled")
    browser.run(drop.format(name="cat.tif", kind="image/tiff", text="II*\\0"))
    browser.until("!document.getElementById('go').disabled")


def test_the_edge_between_source_and_result_moves_by_keys(browser: Browser, live: Live):
    shown(browser, live, predict(live))
    browser.until(DRAWN)
    browser.run("document.querySelector('input[type=range]').focus()")
    cut = "Number(document.querySelector('.viewer').dataset.cut)"
    assert browser.run(cut) == 0.5
    browser.press("ArrowRight")
    browser.until(f"{cut} > 0.5")
    browser.press("Home")
    browser.until(f"{cut} === 0")


def test_a_failure_is_one_sentence(browser: Browser, live: Live):
    shown(browser, live, predict(live, prompt="fail"))
    browser.until("document.getElementById('state').textContent === 'Failed'")
    assert browser.run("document.getElementById('error').innerText") == "The model broke."
    assert browser.run("document.querySelectorAll('.viewer').length") == 0


def test_a_press_of_cancel_ends_a_prediction(browser: Browser, live: Live):
    made = predict(live, prompt="gated")
    shown(browser, live, made)
    browser.until("!document.getElementById('cancel').hidden")
    browser.run("document.getElementById('cancel').click()")
    browser.until("document.getElementById('state').textContent === 'Cancelled'")
    assert live.store.predictions.get(made).status == "canceled"


def test_a_shared_page_opens_to_others_until_it_is_taken_back(browser: Browser, live: Live):
    made = predict(live, BATOU)
    shown(browser, live, made)
    browser.until(DRAWN)
    browser.run("document.getElementById('share').click()")
    link = browser.until("document.getElementById('link').value")
    browser.call("Network.clearBrowserCookies")
    browser.open(link)
    browser.until(DRAWN)
    assert browser.run("document.getElementById('token-form').hidden")
    assert browser.run("document.getElementById('sharing').hidden")
    shown(browser, live, made)
    browser.until("document.getElementById('share').checked")
    browser.run("document.getElementById('share').click()")
    browser.until("!document.getElementById('share').checked")
    browser.open(link)
    browser.until("document.getElementById('page-error').textContent.length > 0")
    assert browser.run("document.getElementById('shown').hidden")


def test_a_token_is_in_no_address_and_nothing_leaves_the_server(browser: Browser, live: Live):
    browser.open(f"{live.url}/#token={live.token}")
    browser.until("!document.getElementById('upscale-form').hidden")
    assert browser.run("location.href") == f"{live.url}/"
    browser.open(f"{live.url}/p/{predict(live)}")
    browser.until(DRAWN)
    assert len(browser.requested) > 8
    for url in browser.requested:
        assert url.startswith((live.url, "data:", "blob:")), url
        assert live.token not in url
    assert live.token not in browser.run("document.documentElement.outerHTML")


def test_an_unknown_token_is_asked_for_again(browser: Browser, live: Live):
    browser.open(f"{live.url}/")
    browser.until("!document.getElementById('token-form').hidden")
    browser.run("document.getElementById('token').value = 'nonsense'")
    browser.run("document.getElementById('token-form').requestSubmit()")
    browser.until("document.getElementById('token-error').textContent.includes('not know')")
    assert browser.call("Network.getCookies")["cookies"] == []


@pytest.mark.parametrize("page", ["/", "/docs", "/p/"])
def test_a_narrow_page_does_not_scroll_sideways_and_names_everything(
    browser: Browser, live: Live, page: str
):
    address = page + (predict(live, prompt="p" * 200) if page == "/p/" else "")
    browser.open(live.url + address)
    if page != "/docs":
        sign_in(browser, live)
    if page == "/p/":
        browser.until(DRAWN)
    browser.until("document.querySelector('main').innerText.length > 100")
    browser.resize(360)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    named = browser.names()
    assert named["link"]
    assert [kind for kind, names in named.items() if not all(names)] == []


# Behind a gateway that mounts the server at a path.


@contextmanager
def mounted(folder: Path, *, keeps_mount: bool) -> Iterator[tuple[Live, str]]:
    """A server as clients reach it through a gateway, and how this machine reaches it itself."""
    port = free_port()
    with (
        proxy([port], "/deep/tile", keeps_mount=keeps_mount) as gateway,
        live_server(
            folder, port=port, public_url=f"{gateway}/deep/tile/", inline_output_bytes=0
        ) as live,
    ):
        yield dataclasses.replace(live, url=f"{gateway}/deep/tile"), live.url


@pytest.mark.parametrize("keeps_mount", [False, True])
def test_every_link_leads_through_the_gateway(tmp_path, keeps_mount):
    with (
        mounted(tmp_path, keeps_mount=keeps_mount) as (live, _),
        httpx.Client(timeout=300) as client,
    ):
        client.headers["authorization"] = f"Bearer {live.token}"
        parts = {"content": ("a.png", PNG)}
        file = client.post(f"{live.url}/v1/files", files=parts).json()
        made = predict(live, image=file["urls"]["get"])
        shown = client.get(f"{live.url}/v1/predictions/{made}").json()
        stream = client.get(shown["urls"]["stream"], headers={"authorization": ""}).text
        assert "event: done" in stream
        shown = client.get(shown["urls"]["get"]).json()
        opened = [shown["output"], file["urls"]["download"], shown["input"]["image"]]
        assert f"data: {shown['output']}\n" in stream
        for link in (*shown["urls"].values(), *file["urls"].values(), *opened):
            assert link.startswith(f"{live.url}/"), link
        for link in opened[:2]:
            assert client.get(link, headers={"authorization": ""}).content == PNG
        assert client.post(shown["urls"]["cancel"]).json()["status"] == "succeeded"
        share = client.post(f"{shown['urls']['get']}/share").json()["url"]
        assert "text/html" in client.get(share).headers["content-type"]
        pinned = {"model": "tegula/upscale", "version": "latest", "hardware": "cpu"}
        for number in range(26):
            body = {**pinned, "name": f"d{number}", "min_instances": 0, "max_instances": 1}
            client.post(f"{live.url}/v1/deployments", json=body)
        page = client.get(f"{live.url}/v1/deployments").json()
        rest = client.get(page["next"]).json()
        assert (len(page["results"]), len(rest["results"])) == (25, 1)
        assert client.get(rest["previous"]).json()["results"] == page["results"]
        model = client.get(f"{live.url}/v1/models/tegula/upscale").json()["url"]
        assert client.get(model).text.startswith("# tegula/upscale")
        for prefix in ("/v1/v1", ""):  # as clients write it whose address has /v1, or lacks it
            assert client.get(f"{live.url}{prefix}/account").json()["username"] == "ana"


@pytest.mark.parametrize("keeps_mount", [False, True])
def test_the_pages_work_behind_the_gateway(tab: Browser, photo, tmp_path, keeps_mount):
    with mounted(tmp_path / "server", keeps_mount=keeps_mount) as (live, own):
        tab.open("about:blank")  # the page of the test before asks no more
        tab.requested.clear()
        tab.said.clear()
        tab.open(f"{live.url}/")
        sign_in(tab, live)
        tab.until("!document.getElementById('upscale-form').hidden")
        tab.choose_file("#file", photo)
        tab.until("!document.getElementById('go').disabled")
        tab.run("document.getElementById('field-prompt').value = 'gated'")
        tab.run("document.getElementById('go').click()")
        tab.until(PERCENT)
        live.gate.set()
        tab.until(DONE)
        tab.until(DRAWN)
        assert tab.run("location.pathname").startswith("/deep/tile/p/")
        made = tab.run("location.pathname.split('/').pop()")
        assert live.store.predictions.get(made).source == "web"
        tab.run("document.querySelector('.bar nav a:last-of-type').click()")
        tab.until("document.title === 'The API of tegula'")
        tab.run("document.querySelector('.brand').click()")
        tab.until("document.querySelector('#list a') !== null")
        tab.run("document.querySelector('#list a').click()")
        tab.until(DRAWN)
        tab.run("document.getElementById('sign-out').click()")
        tab.until("!document.getElementById('token-form').hidden")
        assert tab.run("location.pathname") == "/deep/tile/"
        requested = [url for url in tab.requested if not url.startswith(("data:", "blob:"))]
        assert [url for url in requested if not url.startswith(f"{live.url}/")] == []
        # On this machine itself the same page stays with the address that it was opened by.
        tab.requested.clear()
        shown(tab, dataclasses.replace(live, url=own), made)
        tab.until(DRAWN)
        requested = [url for url in tab.requested if not url.startswith(("data:", "blob:"))]
        assert [url for url in requested if not url.startswith(f"{own}/")] == []
        assert [text for text in tab.said if "status of 40" not in text] == []
