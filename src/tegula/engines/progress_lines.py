"""Progress as lines that every client's parser of progress bars reads."""

from __future__ import annotations

_WIDTH = 10


def progress_line(fraction: float, spent: float, left: float | None) -> str:
    """Return a line like a bar of tqdm, counting in hundredths of the work.

    Args:
        fraction: share of the work that is done, 0..1.
        spent: seconds since the work began.
        left: seconds until it ends, if known.

    >>> progress_line(0.42, 3.0, 4.2)
    ' 42%|####      | 42/100 [00:03<00:04]'
    """
    percent = int(fraction * 100)
    bar = ("#" * (percent * _WIDTH // 100)).ljust(_WIDTH)
    return f"{percent:3d}%|{bar}| {percent}/100 [{_clock(spent)}<{_clock(left)}]"


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
