"""The program around the commands: help, errors, signals and pipes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from api_support import PNG
from cli_support import names_in, put, run, start_fake
from live_server import Live, eventually, live_server
from serve_support import free_port

import tegula.errors
from tegula import __version__, errors
from tegula import upscaler as upscaler_module
from tegula.cli.program import PROGRAM
from tegula.errors import MissingExtraError, TegulaError
from tegula.models import BACKENDS, PRECISIONS, device, optimise
from tests.tiny.networks import tiny_bundle

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "cv2", "rich")
OF_THE_SERVER = {"fetch", "not_found", "conflict", "busy", "worker"}
DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def errors_of_the_tree():
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, TegulaError)
    ]


def test_help_brings_nothing_heavy_along():
    words = [[], *([name] for name in PROGRAM.commands)]
    program = (
        "import sys\nfrom tegula.cli import main\n"
        f"for words in {words}:\n"
        "    sys.argv = ['tegula', *words, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: status = end.code\n"
        f"    heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "    print(words, heavy, status, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    usages = re.findall(r"^Usage: tegula ?(\w*)", done.stdout, re.MULTILINE)
    assert [usage for usage in usages if usage] == list(PROGRAM.commands)
    assert len(usages) == len(words)
    assert done.stderr.splitlines() == [f"{each} [] 0" for each in words]


def test_commands_that_open_the_store_alone_bring_no_web_framework(tmp_path):
    program = (
        "import sys\nfrom tegula.cli import main\n"
        "try: main()\nexcept SystemExit as end: status = end.code\n"
        "print(status, {'fastapi', 'starlette', 'uvicorn'} & {*sys.modules}, file=sys.stderr)"
    )
    words = ["tokens", "list", "--folder", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.stderr.strip() == "0 set()"


@pytest.mark.parametrize("name", ["fastapi", "sqlalchemy", "pythonjsonlogger"])
def test_a_server_without_its_packages_says_how_to_install_them(monkeypatch, name, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    result = run("tokens", "list", "--folder", tmp_path)
    assert result.exit_code == MissingExtraError.exit_status
    assert "packages of its own: pip install 'tegula[server]'" in result.stderr


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "tegula", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == f"tegula {__version__}"


def raising(monkeypatch, error):
    def load(**named):
        raise error

    monkeypatch.setattr(upscaler_module.Upscaler, "load", load)


@pytest.mark.parametrize("kind", errors_of_the_tree(), ids=lambda kind: kind.__name__)
def test_every_error_is_one_line_and_its_status(kind, tmp_path, monkeypatch):
    raising(monkeypatch, kind("It did\nnot work."))
    source = put(tmp_path / "a.png")
    result = run("upscale", source)
    assert result.exit_code == kind.exit_status
    assert result.stderr == "tegula: It did not work.\n"
    as_json = run("upscale", source, "--json")
    assert as_json.exit_code == kind.exit_status
    assert json.loads(as_json.stdout) == {
        "error": {"code": kind.code, "message": "It did not work."}
    }


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError(), KeyError("x")])
def test_an_unexpected_error_is_one_line_with_a_hint(error, tmp_path, monkeypatch):
    raising(monkeypatch, error)
    source = put(tmp_path / "a.png")
    result = run("upscale", source)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "--debug" in result.stderr
    assert run("--debug", "upscale", source).exception is error


def test_memory_that_runs_out_has_its_own_status(tmp_path, monkeypatch):
    raising(monkeypatch, MemoryError())
    assert run("upscale", put(tmp_path / "a.png")).exit_code == 8


@pytest.mark.parametrize("words", [["upscale"], ["upscale", "a", "--nonsense"], ["nonsense"]])
def test_bad_usage_is_status_2(words):
    assert run(*words).exit_code == 2


def test_the_documented_statuses_are_those_of_the_errors():
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    documented = {int(status): set(re.findall(r"`(\w+)`", text)) for status, text in rows}
    here = [kind for kind in errors_of_the_tree() if kind.code not in OF_THE_SERVER]
    for kind in here:
        assert kind.code in documented[kind.exit_status], kind
    assert set.union(*documented.values()) == {kind.code for kind in here} | {"internal"}


def test_every_error_is_on_the_page_of_errors():
    assert all(kind.__module__ == tegula.errors.__name__ for kind in errors_of_the_tree())


def test_the_precisions_on_offer_are_those_of_the_devices():
    dtypes = {device.pick_dtype(torch.device("cpu"), name) for name in PRECISIONS}
    assert dtypes == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backends_on_offer_are_those_that_models_run_on(backend):
    with contextlib.suppress(MissingExtraError):
        optimise.optimise_bundle(tiny_bundle(), backend, compiled=False)


BUSY = """
print("busy", file=sys.stderr, flush=True)
while not cancelled():
    time.sleep(0.01)
raise CancelledError("Cancelled before refine; nothing was written.")
"""
DEAF = """
print("busy", file=sys.stderr, flush=True)
while True:
    if cancelled(): print("noted", file=sys.stderr, flush=True)
    time.sleep(0.01)
"""
REPORTING = """
from tegula.progress import Progress
on_progress(Progress("refine", 3, 12, 0.75, 65.0))
while not cancelled():
    time.sleep(0.01)
raise CancelledError("Cancelled.")
"""
# One long sleep could begin just after the signal, and then nothing would end it.
LOADING = 'print("busy", file=sys.stderr, flush=True); [time.sleep(0.1) for _ in range(6000)]'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [{"upscale": BUSY}, {"load": LOADING}], ids=["work", "load"])
def test_a_signal_stops_the_work_and_leaves_nothing(tmp_path, number, code):
    source = put(tmp_path / "a.png")
    process = start_fake(source, tmp_path / "new" / "", "-o", f"{tmp_path}/out/", **code)
    assert process.stderr.readline() == "busy\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 130
    assert printed.splitlines()[-1].startswith("tegula: Cancelled")
    assert names_in(tmp_path) == ["a.png"]


def test_a_signal_stops_the_loading_of_a_model_by_its_name_at_once(tmp_path):
    source = put(tmp_path / "a.png")
    process = start_fake("tegula/upscale", f"image=@{source}", command="run", load=LOADING)
    assert process.stderr.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 130
    assert printed.splitlines()[-1].startswith("tegula: Cancelled")


def test_a_terminal_shows_stage_windows_and_time_left(tmp_path):
    reader, writer = os.openpty()
    process = start_fake(put(tmp_path / "a.png"), upscale=REPORTING, stderr=writer)
    os.close(writer)
    shown, signalled = b"", False
    with contextlib.suppress(OSError):
        while block := os.read(reader, 65536):
            shown += block
            if b"0:01:05 left" in shown and not signalled:
                process.send_signal(signal.SIGINT)
                signalled = True
    os.close(reader)
    process.communicate(timeout=300)
    assert process.returncode == 130
    assert b"refine 3/12 windows" in shown
    assert b"75%" in shown
    assert b"0:01:05 left" in shown


def test_a_second_signal_kills_what_does_not_listen(tmp_path):
    process = start_fake(put(tmp_path / "a.png"), upscale=DEAF)
    assert process.stderr.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "noted\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT


def test_a_reader_that_goes_away_is_no_traceback():
    command = [sys.executable, "-m", "tegula", "models"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == ""


NOT_FOR_MINI = (
    "diffusers",
    "transformers",
    "accelerate",
    "spandrel",
    "huggingface_hub",
    "requests",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch.fx.experimental.symbolic_shapes",
)
"""Libraries that take longer to import than a small picture to enlarge."""


def test_an_upscale_with_mini_imports_nothing_that_it_does_not_need(tmp_path):
    code = (
        "import sys; from tegula.cli import main; from PIL import Image;"
        "Image.new('RGB', (8, 8)).save(sys.argv[1]);"
        "sys.argv = ['tegula', 'upscale', *sys.argv[1:], '-q'];"
        f"exec('try: main()\\nexcept SystemExit as end: assert not end.code');"
        f"sys.exit(' '.join(name for name in {NOT_FOR_MINI} if name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in.png"), str(tmp_path / "out.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "out.png").is_file(), done.stderr
    assert done.stderr.strip() == ""


def start(*words, shell="", **environment):
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "tegula", *words]
    settings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, env=settings, timeout=300)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_pipes_are_utf_8_whatever_the_locale(encoding, tmp_path):
    name = tmp_path / "\u5199\u771f.png"
    settings = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = start("upscale", str(name), **settings)
    assert done.returncode == 5
    assert "\u5199\u771f.png does not exist" in done.stderr.decode("utf-8")
    as_json = start("upscale", "--json", str(name), **settings).stdout
    assert name.name in json.loads(as_json)["error"]["message"]


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such names")
def test_a_name_that_is_not_utf_8_is_escaped_as_json_has_it(tmp_path):
    done = start("upscale", "--json", os.fsdecode(b"b\xff.png"))
    assert "b\udcff.png" in json.loads(done.stdout)["error"]["message"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such shell")
def test_closed_streams_are_no_traceback(tmp_path):
    source = put(tmp_path / "a.png")
    for shell in ("<&-", "2>&-", "<&- >&- 2>&-"):
        assert start("models", shell=shell).returncode == 0
    assert start("upscale", str(tmp_path / "no.png"), shell=">&- 2>&-").returncode == 5
    closed = start("upscale", str(source), "-", shell=">&-")
    assert closed.returncode == 5
    assert b"Standard output is closed" in closed.stderr
    empty = start("upscale", "-", "-", shell="<&-")
    assert (empty.returncode, b"is empty" in empty.stderr) == (3, True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a full device")
@pytest.mark.parametrize("arguments", [("models",), ("models", "--json")])
def test_a_full_output_is_one_sentence(arguments):
    done = start(*arguments, shell="> /dev/full")
    assert done.returncode == 5
    assert done.stderr.count(b"\n") == 1
    assert b"Standard output cannot be written" in done.stderr


# On a server.


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with live_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def on_server(server, *words):
    return run("run", "--server", server, *words)


def test_a_server_does_the_work(live: Live, tmp_path, monkeypatch):
    monkeypatch.setenv("TEGULA_TOKEN", live.token)
    photo = put(tmp_path / "photo.png")
    inputs = ("tegula/upscale", f"image=@{photo}", "scale=3", "seamless=true")
    done = on_server(f"{live.url}/v1/", *inputs, "-o", tmp_path / "large", "--json")
    assert done.exit_code == 0, done.output
    result = tmp_path / "large" / "photo-upscale-0.png"
    assert json.loads(done.stdout) == {"output": str(result)}
    assert result.read_bytes() == PNG
    row = live.store.predictions.page(None).items[0]
    assert (row.input["scale"], row.input["seamless"]) == (3, True)


def test_what_a_server_says_is_one_sentence(live: Live, tmp_path, monkeypatch):
    photo = f"image=@{put(tmp_path / 'photo.png')}"
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("TEGULA_TOKEN", live.token)
    for server, words, status, sentence in (
        (live.url, (photo, "scale=99"), 2, "input.scale: Must be less than or equal to 8"),
        (live.url, (photo, "prompt=fail"), 9, "The model broke."),
        (live.url, ("image=@nothing.png",), 5, "nothing.png cannot be used"),
        (nobody, (photo,), 9, f"{nobody} does not answer"),
        ("gpu:5000", (photo,), 2, "such as http://gpu:5000, not gpu:5000"),
        (live.url, (photo, "--model", "mini"), 2, "exclude each other"),
    ):
        done = on_server(server, "tegula/upscale", *words)
        assert (done.exit_code, sentence in done.stderr) == (status, True), done.stderr
        assert done.stderr.count("\n") == 1
    monkeypatch.setenv("TEGULA_TOKEN", "tgl_nonsense")
    done = on_server(live.url, "tegula/upscale", photo)
    assert (done.exit_code, "does not know the token" in done.stderr) == (9, True)


def test_stopping_cancels_what_a_server_does(live: Live, tmp_path):
    words = ["tegula/upscale", f"image=@{put(tmp_path / 'photo.png')}", "prompt=gated"]
    program = subprocess.Popen(
        [sys.executable, "-m", "tegula", "run", "--server", live.url, *words],
        env={**os.environ, "TEGULA_TOKEN": live.token},
    )

    def newest():
        return live.store.predictions.page(None).items[0]

    eventually(lambda: newest().input.get("prompt") == "gated" and newest().status == "processing")
    program.send_signal(signal.SIGINT)
    assert program.wait(300) == 130
    assert newest().status == "canceled"
