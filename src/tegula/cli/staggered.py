"""Many items through three steps, of which the middle one is what time is spent on.

While one item is worked on, the next is read and the one before is written, each in a
thread of its own. At most one item waits on either side, so memory holds three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import zip_longest
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")


def staggered(
    items: Sequence[Item],
    read: Callable[[Item], Read],
    work: Callable[[Item, Read], Made],
    write: Callable[[Item, Made], None],
    failed: Callable[[Item, Exception], None],
    stopping: tuple[type[BaseException], ...],
) -> None:
    """Read, work on, and write items; every step sees them in their order.

    Args:
        items: what there is to do.
        read: runs ahead, in a thread.
        work: runs here.
        write: runs behind, in a thread.
        failed: told in the place of ``write``, and in its thread, what went wrong.
        stopping: errors that end the whole. What was worked on before is written first.

    Raises:
        Exception: one of ``stopping``, from any step.
    """
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming: list[Future[Read]] = [reader.submit(read, item) for item in items[:1]]
        writing: Future[None] | None = None
        for item, following in zip_longest(items, items[1:]):
            ready = coming.pop()
            if following is not None:
                coming.append(reader.submit(read, following))
            try:
                after = partial(_written, item, work(item, ready.result()), write, failed, stopping)
            except stopping:
                raise
            except Exception as error:  # noqa: BLE001, RUF100 - each is told of in its turn
                after = partial(failed, item, error)
            if writing is not None:
                writing.result()
            writing = writer.submit(after)
        if writing is not None:
            writing.result()


def _written(
    item: Item,
    made: Made,
    write: Callable[[Item, Made], None],
    failed: Callable[[Item, Exception], None],
    stopping: tuple[type[BaseException], ...],
) -> None:
    try:
        write(item, made)
    except stopping:
        raise
    except Exception as error:  # noqa: BLE001, RUF100
        failed(item, error)
