"""Talking to strangers: what is refused, and what is given up."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from receiver_support import receiving

from tegula.errors import CancelledError, FetchError
from tegula.server import fetch
from tegula.server.addresses import Policy
from tegula.server.fetch import CancelToken, Fetcher

PUBLIC, LOOPBACK = Policy(), Policy(private=True, ports=())


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"], ["169.254.169.254"], []],
    ids=["loopback", "public and private", "loopback 6", "metadata", "none"],
)
def test_a_name_with_any_internal_address_is_refused(answers):
    fetcher = Fetcher(PUBLIC, lambda host, port: answers)
    with pytest.raises(FetchError, match="public internet"), open_url(fetcher, "http://evil.test/"):
        pass


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f.1", "017700000001", "127.1", "localhost", "0", "[::]"]
)
def test_odd_ways_to_write_the_loopback_are_refused(host):
    with pytest.raises(FetchError), open_url(Fetcher(PUBLIC), f"http://{host}/"):
        pass


def test_a_name_is_looked_up_once_and_connected_to_where_it_was_checked():
    seen = []

    def rebinding(host, port):
        seen.append(host)
        return ["127.0.0.1"] if len(seen) == 1 else ["169.254.169.254"]

    with receiving() as receiver:
        fetcher = Fetcher(LOOPBACK, rebinding)
        with open_url(fetcher, f"http://cat.test:{receiver.port}/cat.png") as fetched:
            assert b"".join(fetched.chunks) == b"hello"
        assert fetched.name == "cat.png"
        assert receiver.requests[0][2]["host"] == f"cat.test:{receiver.port}"
    assert seen == ["cat.test"]


def open_url(fetcher, url, *, limit=1000, seconds=300.0):
    return fetcher.get(url, limit=limit, seconds=seconds)


@pytest.fixture
def receiver():
    with receiving() as server:
        yield server


@pytest.fixture
def fetcher():
    return Fetcher(LOOPBACK)


def test_authorities_are_read_once_and_only_for_https(receiver, fetcher, monkeypatch):
    read, context = [], ssl.create_default_context()
    monkeypatch.setattr("httpcore.default_ssl_context", lambda: read.append(1) or context)
    fetch._known_authorities.cache_clear()
    with open_url(fetcher, receiver.url) as fetched:
        assert b"".join(fetched.chunks) == b"hello"
    assert not read
    for each in (fetcher, Fetcher(LOOPBACK)):
        with pytest.raises(FetchError), open_url(each, f"https://127.0.0.1:{receiver.port}/"):
            pass
    assert read == [1]
    fetch._known_authorities.cache_clear()


def test_redirects_are_followed_and_checked_one_by_one(receiver, fetcher):
    receiver.handle = redirect(lambda path: "/b" if path == "/a" else None)
    with open_url(fetcher, f"{receiver.url}/a") as fetched:
        assert b"".join(fetched.chunks) == b"ok"
    receiver.handle = redirect(lambda path: "http://169.254.169.254/latest")
    with pytest.raises(FetchError), open_url(fetcher, receiver.url):
        pass


@pytest.mark.parametrize("location", ["http://[", "//[::1", "http://a:99999999/", "\xff"])
def test_a_redirect_to_what_is_no_address_is_an_error_of_the_fetch(receiver, fetcher, location):
    receiver.handle = redirect(lambda path: location)
    with pytest.raises(FetchError), open_url(fetcher, receiver.url):
        pass


def test_a_pause_of_any_length_is_read(receiver, fetcher):
    receiver.status, receiver.headers = 503, {"retry-after": "9" * 5000}
    assert fetcher.post(receiver.url, b"{}", {}, seconds=300).retry_after == float("inf")


def test_a_circle_of_redirects_is_left(receiver, fetcher):
    receiver.handle = redirect(lambda path: path + "x")
    with pytest.raises(FetchError, match="redirects"), open_url(fetcher, receiver.url):
        pass
    assert len(receiver.requests) == 4


def redirect(to):
    def answer(request):
        place = to(request.path)
        request.send_response(302 if place else 200)
        if place:
            request.send_header("location", place)
        request.send_header("content-length", "0" if place else "2")
        request.end_headers()
        if not place:
            request.wfile.write(b"ok")

    return answer


def test_reading_stops_at_the_limit_whatever_the_header_claims(receiver, fetcher):
    def endless(request):
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(b"x" * 10_000)
        except OSError:
            pass

    receiver.handle = endless
    with pytest.raises(FetchError, match="more than 1,000"), open_url(fetcher, receiver.url) as got:
        list(got.chunks)


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_drips_is_given_up_in_time(receiver, fetcher, part):
    def drip(request):
        if part == "body":
            request.send_response(200)
            request.end_headers()
        try:
            for _ in range(200):
                request.wfile.write(b"H")
                request.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass

    receiver.handle = drip
    with pytest.raises(FetchError), open_url(fetcher, receiver.url, seconds=0.3) as got:
        list(got.chunks)


def hold(part, until_closed):
    """Answer as far as a part, then wait until the other side closes the connection."""

    def answer(request):
        request.protocol_version = "HTTP/1.0"  # a body that ends where the connection does
        if part == "body":
            request.send_response(200)
            request.end_headers()
            request.wfile.write(b"half")
            request.wfile.flush()
        request.connection.settimeout(300)
        if request.connection.recv(1) == b"":
            until_closed.set()

    return answer


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_fetch_is_ended_from_another_thread_by_closing_its_connection(receiver, fetcher, part):
    closed, token = threading.Event(), CancelToken()
    receiver.handle = hold(part, closed)
    begun = time.monotonic()
    threading.Timer(0.1, token.cancel).start()
    with (
        pytest.raises(CancelledError),
        fetcher.get(receiver.url, limit=1000, seconds=600, token=token) as got,
    ):
        list(got.chunks)
    assert closed.wait(300)
    assert time.monotonic() - begun < 300


def test_a_fetch_is_ended_while_its_host_is_looked_up(receiver):
    token, known = CancelToken(), threading.Event()

    def resolve(host, port):
        threading.Timer(0.05, token.cancel).start()
        known.wait(600)
        return ["127.0.0.1"]

    begun = time.monotonic()
    fetcher = Fetcher(LOOPBACK, resolve)
    with (
        pytest.raises(CancelledError),
        fetcher.get(receiver.url, limit=9, seconds=600, token=token),
    ):
        pass
    assert time.monotonic() - begun < 300
    # What was left behind connects to nothing.
    left_behind = token.left_behind
    known.set()
    left_behind.join(300)
    assert (token.left_behind, receiver.requests) == (None, [])


def test_a_fetch_is_ended_while_it_connects():
    token = CancelToken()
    with socket.socket() as full, socket.socket() as first:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        first.connect(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"
        threading.Timer(0.05, token.cancel).start()
        begun = time.monotonic()
        fetcher = Fetcher(LOOPBACK)
        with pytest.raises(CancelledError), fetcher.get(url, limit=9, seconds=600, token=token):
            pass
        assert time.monotonic() - begun < 300


def test_looking_a_host_up_counts_into_the_time_of_a_fetch(receiver):
    known = threading.Event()

    def resolve(host, port):
        known.wait(600)
        return ["127.0.0.1"]

    fetcher = Fetcher(LOOPBACK, resolve)
    begun = time.monotonic()
    with (
        pytest.raises(FetchError, match="too slowly"),
        open_url(fetcher, receiver.url, seconds=0.1),
    ):
        pass
    assert time.monotonic() - begun < 300
    known.set()


def test_before_a_redirect_to_another_host_is_followed_somebody_may_make_it_wait(receiver, fetcher):
    elsewhere = receiver.url.replace("127.0.0.1", "localhost")
    receiver.handle = redirect({"/a": "/b", "/b": f"{elsewhere}/c"}.get)
    admitted = []

    def admit(host):
        admitted.append((host, len(receiver.requests)))
        time.sleep(2.1)  # more than the fetch has

    with fetcher.get(f"{receiver.url}/a", limit=99, seconds=2, admit=admit) as fetched:
        assert b"".join(fetched.chunks) == b"ok"
    assert admitted == [("localhost", 2)]


def test_a_token_that_was_cancelled_before_lets_nothing_be_fetched(receiver, fetcher):
    token = CancelToken()
    token.cancel()
    with (
        pytest.raises(CancelledError),
        fetcher.get(receiver.url, limit=1000, seconds=5, token=token),
    ):
        pass
    assert receiver.requests == []


@pytest.mark.parametrize("status", [204, 206, 304, 401, 404, 500])
def test_anything_but_200_is_no_input_and_its_body_is_not_told(receiver, fetcher, status):
    receiver.status, receiver.body = status, b"secret"
    with pytest.raises(FetchError, match=str(status)) as error, open_url(fetcher, receiver.url):
        pass
    assert "secret" not in str(error.value)


def test_compressed_answers_are_refused(receiver, fetcher):
    receiver.headers = {"content-encoding": "gzip"}
    with pytest.raises(FetchError, match="compressed"), open_url(fetcher, receiver.url):
        pass


def test_a_closed_port_is_told_without_its_address(fetcher):
    with pytest.raises(FetchError) as error, open_url(fetcher, "http://localhost:9/"):
        pass
    assert "127.0.0.1" not in str(error.value)


def test_proxies_of_the_environment_are_not_used(receiver, fetcher, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with open_url(fetcher, receiver.url) as got:
        assert b"".join(got.chunks) == b"hello"


def test_a_post_follows_no_redirect_and_reads_when_to_come_back(receiver, fetcher):
    receiver.status, receiver.headers = 307, {"location": "/elsewhere", "retry-after": "7"}
    answer = fetcher.post(receiver.url, b"{}", {"webhook-id": "msg_1"}, seconds=300)
    assert (answer.status, answer.retry_after) == (307, 7)
    (request,) = receiver.requests
    assert (request[0], request[3], request[2]["webhook-id"]) == ("POST", b"{}", "msg_1")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for cat.test, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=cat"
    names = ["-addext", "subjectAltName=DNS:cat.test", "-keyout", "key.pem", "-out", "cert.pem"]
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")
    subprocess.run([openssl, *words.split(), *names], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem", folder / "key.pem"


@pytest.mark.parametrize(("host", "fits"), [("cat.test", True), ("dog.test", False)])
def test_a_certificate_is_checked_against_the_name_and_not_the_address(certificate, host, fits):
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=certificate[0])
    with receiving(serving) as receiver:
        fetcher = Fetcher(LOOPBACK, lambda host, port: ["127.0.0.1"], trusting)
        url = f"https://{host}:{receiver.port}/cat.png"
        if fits:
            with open_url(fetcher, url) as got:
                assert b"".join(got.chunks) == b"hello"
            closed, token = threading.Event(), CancelToken()
            receiver.handle = hold("body", closed)
            threading.Timer(0.1, token.cancel).start()
            with (
                pytest.raises(CancelledError),
                fetcher.get(url, limit=1000, seconds=600, token=token) as got,
            ):
                list(got.chunks)
            assert closed.wait(300)
        else:
            with pytest.raises(FetchError), open_url(fetcher, url):
                pass
