"""Actors that help each other: windows and tiles of a large picture, spread over idle ones.

The server introduces its actors to each other. One that runs a large picture sends tasks to the
others (``pipeline/shards.py``), which do them while they have no prediction of their own: one that
has answers at once that it is busy, and one that gets a prediction in the middle of a task drops
the task. So help is what nobody else wanted, no prediction ever waits for it, and no account gets
behind another's large pictures.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable
from uuid import uuid4

from tegula.errors import CancelledError
from tegula.progress import Cancel, Cancelled

if TYPE_CHECKING:  # the server's process runs without torch
    from torch import Tensor

    from tegula.pipeline.shards import Helper, Task

log = logging.getLogger(__name__)
T = TypeVar("T")

_LOOK_EVERY_S = 0.1
_ASK_AGAIN_S = 1.0
"""A helper that was busy is left alone for so long."""
_FIRST_ANSWERS_S = 2.0
"""How long a picture waits for helpers that are idle to say so; loading another bundle takes more,
and they join in later."""


Free = Callable[[Hashable, object], "Sequence[Helper]"]
"""Returns the helpers that are free: given which nets they need, and what kind of nets those are,
which has to be the same for all."""


@runtime_checkable
class HelpfulRunner(Protocol):
    """A runner that can help others with the same nets, and be helped by them."""

    def help(self, nets: Any, task: Task, cancel: Cancel) -> Sequence[Tensor]:
        """Do a task with some nets."""

    def kind(self, nets: Any) -> object:
        """Load nets, where they are not, and return what kind they are: precision and such."""

    def be_helped_by(self, free: Free) -> None:
        """Spread large pictures over the helpers that this returns, from now on."""


@dataclass(frozen=True)
class Sharding:
    """Says that an actor spreads a picture, and that others are of use to it."""


@dataclass(frozen=True)
class Peer:
    """Another actor: its handle, and a name that no other one has or gets."""

    name: str
    handle: Any


class Helping:
    """The side of an actor that helps: one task at a time, and none beside its own jobs."""

    def __init__(self) -> None:
        self.runner: HelpfulRunner | None = None
        self._nets = threading.Lock()
        self._own = threading.Event()
        self._dropped = ""

    @contextmanager
    def own_job(self) -> Iterator[None]:
        """Have the nets for a job of one's own, as soon as a task of another has been dropped."""
        self._own.set()
        with self._nets:
            self._own.clear()
            yield

    def kind(self, nets: Any) -> object | None:
        """Get nets ready and return their kind; None when busy."""
        return self._unless_busy(lambda runner: runner.kind(nets))

    def help(self, nets: Any, task: Task, call: str) -> Sequence[Tensor] | None:
        """Do a task; None when busy, or when it was dropped by either side."""

        def dropped() -> bool:
            return self._own.is_set() or self._dropped == call

        return self._unless_busy(lambda runner: runner.help(nets, task, Cancel(dropped)))

    def drop(self, call: str) -> None:
        """End a task whose result nobody wants any more."""
        self._dropped = call

    def _unless_busy(self, do: Callable[[HelpfulRunner], T]) -> T | None:
        if self.runner is None or not self._nets.acquire(blocking=False):
            return None
        try:
            return do(self.runner)
        except CancelledError:
            return None
        finally:
            self._nets.release()


class Peers:
    """The side of an actor that is helped: whom it knows, and who of them is free.

    Args:
        on_wanted: called when a picture is spread.
    """

    def __init__(self, on_wanted: Callable[[], None]) -> None:
        self._on_wanted = on_wanted
        self._peers: Sequence[Peer] = ()
        self._helpers: dict[str, _PeerHelper] = {}
        self._nets: Hashable = None

    def meet(self, peers: Sequence[Peer]) -> None:
        """Take who is there now, in place of who was there before."""
        self._peers = peers

    def forget(self) -> None:
        """Begin anew with the next job: whoever helped may have other nets by then."""
        self._nets, self._helpers = None, {}

    def free(self, nets: Hashable, kind: object) -> Sequence[Helper]:
        """Return the helpers that are free and have such nets loaded."""
        import ray

        is_first = nets != self._nets
        if is_first:
            self._nets, self._helpers = nets, {}
            self._on_wanted()
        peers = self._peers  # another thread may put others in their place
        self._helpers = {
            peer.name: self._helpers.get(peer.name) or _PeerHelper(peer, nets, kind)
            for peer in peers
        }
        helpers = list(self._helpers.values())
        free = [helper for helper in helpers if helper.is_free()]
        asked = [helper.answer for helper in helpers if helper.answer is not None]
        if is_first and asked:
            ray.wait(asked, num_returns=len(asked), timeout=_FIRST_ANSWERS_S)
            free = [helper for helper in helpers if helper.is_free()]
        return free


class _PeerHelper:
    """Another actor as a helper with certain nets.

    answer: what Ray will have its answer to whether it is free, while that is not there.
    """

    def __init__(self, peer: Peer, nets: Hashable, kind: object) -> None:
        self.name = peer.name
        self.answer: Any = None
        self._handle = peer.handle
        self._nets = nets
        self._kind = kind
        self._ready = self._useless = False
        self._ask_at = 0.0

    def is_free(self) -> bool:
        """Tell whether it is, as far as is known, and ask it if that is not known."""
        import ray

        if self.answer is None:
            if not self._ready and not self._useless and time.monotonic() >= self._ask_at:
                self.answer = self._handle.can_help.remote(self._nets)
            return self._ready
        if ray.wait([self.answer], timeout=0)[0]:
            answer, self.answer = self.answer, None
            try:
                kind = ray.get(answer)
            except Exception as error:  # it died, or has no such nets and cannot load them
                log.warning("An actor cannot help: %s", error)
                self._useless = True
                return False
            self._ready = kind is not None and kind == self._kind
            self._useless = kind is not None and kind != self._kind
            self._be_left_alone()
        return self._ready

    def run(self, task: Task, given_up: Cancelled) -> Sequence[Tensor]:
        """Have a task done; see ``tegula.pipeline.shards.Helper``."""
        import ray

        call = uuid4().hex
        try:
            result = self._handle.help.remote(self._nets, task, call)
            while not ray.wait([result], timeout=_LOOK_EVERY_S)[0]:
                if given_up():
                    # One that hangs is not asked for more: it has to answer first that it is free.
                    self._ready = False
                    self._be_left_alone()
                    self._handle.drop.remote(call)
                    raise CancelledError
            tensors: Sequence[Tensor] | None = ray.get(result)
        except CancelledError:
            raise
        except Exception as error:
            log.warning("An actor failed to help: %s", error)
            self._ready = False
            self._be_left_alone()
            raise
        if tensors is None:
            self._ready = False
            self._be_left_alone()
            raise CancelledError
        return tensors

    def _be_left_alone(self) -> None:
        self._ask_at = time.monotonic() + _ASK_AGAIN_S
