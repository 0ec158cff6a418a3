"""The program under the chaos test, its processes, and the clients that use it meanwhile."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from api_support import PNG
from chaos_program import ARRAY_MODEL, SINGLE_MODEL, run_forked
from chaos_support import forking
from serve_support import free_port

PROGRAM = Path(__file__).with_name("chaos_program.py")
SETTINGS = {
    "lease_seconds": "2",
    "webhook_seconds": "1",
    "fetch_private": "1",
    "fetch_ports": "",
    "creates_per_minute": "0",
    "requests_per_minute": "0",
    "retention_seconds": "0",
    "max_waiting_seconds": "1e9",
}
TWICE = 0.3
_PATIENCE_S = 600.0
_ENDED = ("succeeded", "failed", "canceled")


class Program:
    """`tegula serve` over one folder: started, killed in parts or whole, started again.

    forked: the process is forked from one that has imported the program, for many starts.
    """

    def __init__(self, folder: Path, *, forked: bool = False, **settings: str) -> None:
        self.folder, self.port = folder, free_port()
        given = {
            f"TEGULA_{name.upper()}": value for name, value in {**SETTINGS, **settings}.items()
        }
        self._environment = {**os.environ, **given}
        self._forking = forking() if forked else None
        self._sessions: list[int] = []
        self._log = (folder / "log.jsonl").open("ab")
        where = [sys.executable, PROGRAM, "tokens", "create", "tests", "--folder", str(folder)]
        made = subprocess.run(where, env=self._environment, capture_output=True, check=True)
        self.token = made.stdout.decode().strip()
        self.start()

    def start(self) -> None:
        words = ["serve", "--port", str(self.port), "--device", "cpu", "--folder", str(self.folder)]
        self._server: BaseProcess | subprocess.Popen[bytes]
        if self._forking:
            args = (words, self._environment, self._log.name)
            self._server = self._forking.Process(target=run_forked, args=args)
            self._server.start()
        else:
            self._server = subprocess.Popen(
                [sys.executable, PROGRAM, *words],
                env=self._environment,
                stderr=self._log,
                start_new_session=True,
            )
        self._sessions.append(self._server.pid)

    def kill(self) -> None:
        self._server.kill()
        self._wait()

    def kill_worker(self, moment: float) -> bool:
        """Kill the worker so long after it is seen; False if it went by itself."""
        worker = until(self.workers)[0]
        time.sleep(moment)
        try:
            os.kill(worker, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def workers(self) -> list[int]:
        assert self._status() is None, "the server ended by itself"
        return [pid for pid in children_of(self._server.pid) if b"spawn_main" in command_of(pid)]

    def left_over(self) -> list[bytes]:
        """What still runs of all servers that were ever started."""
        return [command_of(pid) for pid in self._processes(*self._sessions)]

    def stop(self) -> int | None:
        """End it in good order and return its exit status."""
        self._server.terminate()
        status = self._wait()
        self._log.close()
        return status

    def clean_up(self) -> None:
        for pid in self._processes(*self._sessions):
            os.kill(pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> int | None:
        if isinstance(self._server, BaseProcess):
            self._server.join(_PATIENCE_S)
        else:
            self._server.wait(_PATIENCE_S)
        return self._status()

    def _status(self) -> int | None:
        if isinstance(self._server, BaseProcess):
            return self._server.exitcode
        return self._server.poll()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Ask until there is an answer, however often the server dies meanwhile."""
        return until(lambda: self._ask(method, path, body, headers))

    def read(self, path: str) -> bytes:
        return until(lambda: self._exchange("GET", path, None, {}))[1]

    def _ask(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[int, Any] | None:
        given = {"authorization": f"Bearer {self.token}", "content-type": "application/json"}
        text = None if body is None else json.dumps(body)
        answer = self._exchange(method, path, text, {**given, **headers})
        return answer and (answer[0], json.loads(answer[1]))

    def _exchange(
        self, method: str, path: str, body: str | None, headers: dict[str, str]
    ) -> tuple[int, bytes] | None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE_S)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    @staticmethod
    def _processes(*sessions: int) -> list[int]:
        return [
            pid
            for pid in (int(place.name) for place in Path("/proc").glob("[0-9]*"))
            if session_of(pid) in sessions
        ]


def until(look: Any, seconds: float = _PATIENCE_S) -> Any:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return found


def children_of(pid: int | None) -> list[int]:
    """The processes that one started; reading those of all the machine instead takes a while."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            found += map(int, thread.read_text().split())
    return found


def session_of(pid: int) -> int:
    """The session of a process that runs, or 0."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return 0
    return 0 if state == "Z" else int(session)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def create_of(model: str, picture: bytes, webhook: str) -> dict[str, Any]:
    return {
        "version": model,
        "input": {"image": f"data:image/png;base64,{base64.b64encode(picture).decode()}"},
        "webhook": webhook,
        "webhook_events_filter": ["start", "output", "completed"],
    }


@dataclass
class Client:
    """Creates predictions one after the other, each until it is accepted, and looks at them.

    Some are sent twice at once.


    pictures: what was sent, by the id that came back. keys: the key of each create.
    seen: results that a get has shown.
    wrong: answers that should not have been.
    """

    program: Program
    webhook: str
    number: int
    pictures: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, tuple[str, Any]] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    wrong: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.number)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def check(self, name: str) -> None:
        """Get a prediction; a result that was seen once never changes."""
        status, reported = self.program.ask("GET", f"/v1/predictions/{name}")
        if status != 200:
            self.wrong.append((status, reported))
        elif reported["status"] in _ENDED and reported != self.seen.setdefault(name, reported):
            self.wrong.append((self.seen[name], reported))

    def replay(self, name: str) -> str:
        """Send the create of a prediction again; return the id that comes back."""
        key, body = self.keys[name]
        return self.program.ask("POST", "/v1/predictions", body, **{"idempotency-key": key})[1][
            "id"
        ]

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                self._create()
                self.check(self._random.choice(list(self.pictures)))
                time.sleep(self._random.uniform(0.2, 0.5))
        except AssertionError as error:
            self.wrong.append(error)

    def _create(self) -> None:
        key = f"{self.number}-{len(self.pictures)}"
        picture = PNG + key.encode()
        body = create_of(self._random.choice([SINGLE_MODEL, ARRAY_MODEL]), picture, self.webhook)
        answers = self._click(key, body, times=1 + (self._random.random() < TWICE))
        if {status for status, _ in answers} == {201} and len({t["id"] for _, t in answers}) == 1:
            name = answers[0][1]["id"]
            self.pictures[name], self.keys[name] = picture, (key, body)
        else:
            self.wrong.append(answers)

    def _click(self, key: str, body: Any, times: int) -> list[tuple[int, Any]]:
        """Send the same create so often at once, as impatient people do."""

        def click(_: int) -> tuple[int, Any]:
            return self.program.ask("POST", "/v1/predictions", body, **{"idempotency-key": key})

        with ThreadPoolExecutor(times) as pool:
            return list(pool.map(click, range(times)))
