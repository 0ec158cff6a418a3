"""Several pictures of one command: their steps overlap, and they are done at one pace.

Reading, work and writing of neighbours run beside each other (``staggered``); how long what is left
takes follows from the pictures so far (``RemainingWork``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import TypeVar

from tegula.progress import Progress, about

Item = TypeVar("Item")
Read = TypeVar("Read")
Worked = TypeVar("Worked")


def staggered(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Worked],
    write: Callable[[Item, Worked], None],
    failed: Callable[[Item, Exception], None],
    stopping: tuple[type[BaseException], ...],
) -> None:
    """Read, work on, and write items; every step sees them in their order.

    While one item is worked on, the next is read and the one before is written, each in a
    thread of its own. At most one item waits on either side, so memory holds three.

    Args:
        items: what there is to do; looked at one item ahead.
        read: runs ahead, in a thread.
        work: runs here.
        write: runs behind, in a thread.
        failed: called in the place of ``write``, and in its thread, with what went wrong.
        stopping: errors that end everything. What was worked on before is written first.

    Raises:
        Exception: one of ``stopping``, from any step.
    """

    def written(item: Item, worked: Worked) -> None:
        try:
            write(item, worked)
        except stopping:
            raise
        except Exception as error:  # noqa: BLE001, RUF100 - reported, and the others go on
            failed(item, error)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        ahead = iter(items)
        coming = [(item, reader.submit(read, item)) for item in islice(ahead, 1)]
        writing: Future[None] | None = None
        while coming:
            _stop_if_failed(writing)
            item, ready = coming.pop()
            coming += [(after, reader.submit(read, after)) for after in islice(ahead, 1)]
            try:
                behind = partial(written, item, work(item, ready.result()))
            except stopping:
                raise
            except Exception as error:  # noqa: BLE001, RUF100 - reported in its turn
                behind = partial(failed, item, error)
            if writing is not None:
                writing.result()
            writing = writer.submit(behind)
        if writing is not None:
            writing.result()


def _stop_if_failed(writing: Future[None] | None) -> None:
    """Let what stopped the writing stop everything, before the next long work begins."""
    if writing is not None and writing.done():
        writing.result()


class RemainingWork:
    """The pictures of a command that are still to come, and how long they take.

    Work is counted in pixels of results, which a look at the head of each file tells; the
    pace is that of the pictures so far.
    """

    def __init__(self, works: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        """Begin.

        Args:
            works: of all pictures; those that take none are not counted.
            clock: in seconds, from any moment on.
        """
        self._left = list(works)
        self._total = sum(1 for work in works if work)
        self._clock = clock
        self._began: float | None = None
        self._done = 0.0
        self._finished = 0
        self._current = 0.0

    def begin(self, work_index: int) -> None:
        """Go on to a picture."""
        if self._began is None:
            self._began = self._clock()
        self._done += self._current
        self._finished += bool(self._current)
        self._current, self._left[work_index] = self._left[work_index], 0.0

    def skip(self, work_index: int) -> None:
        """Count a picture as finished that failed before its work began."""
        self._finished += bool(self._left[work_index])
        self._left[work_index] = 0.0

    def in_present_pictures(self) -> float:
        """Return the work from the present picture on, in multiples of that picture's."""
        return 1.0 + sum(self._left) / max(1.0, self._current)

    def left(self, progress: Progress) -> float | None:
        """Return the seconds left for all pictures."""
        if self._began is None or progress.seconds_left is None:
            return None
        known = self._clock() - self._began + progress.seconds_left
        return progress.seconds_left + known * sum(self._left) / max(1, self._done + self._current)

    def text(self, progress: Progress) -> str:
        """Return which picture is under way, such as ``37 of 500, 12 min left in all``."""
        return self._text(self._finished + 1, self.left(progress))

    def text_after(self, number: int) -> str:
        """Return the same of the ``number``-th picture, which is done; another one may be begun."""
        done, ahead = self._done, sum(self._left) + self._current
        if number > self._finished:  # the present picture is the one that is done
            done, ahead = done + self._current, ahead - self._current
        spent = 0.0 if self._began is None else self._clock() - self._began
        return self._text(number, spent * ahead / done if done and ahead else None)

    def _text(self, number: int, left: float | None) -> str:
        of_all = f"{min(number, self._total)} of {self._total}"
        return of_all if left is None else f"{of_all}, {about(left)} left in all"
