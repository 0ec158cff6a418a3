"""How the time of some work grows with the length of what it is given."""

import time

TIMES = 8
SUPERLINEAR = 24  # work that grows with the square takes 64 times as long, linear work 8 times
_SHORTEST_S = 5e-4


def growth(work, make, length):
    """Return how many times as long the work takes when its input is eight times as long."""
    short, long = make(length), make(length * TIMES)
    return _seconds(work, long) / max(_seconds(work, short), _SHORTEST_S)


def _seconds(work, given):
    return min(_once(work, given) for _ in range(3))


def _once(work, given):
    start = time.process_time()
    work(given)
    return time.process_time() - start
