"""Tiles and thumbnails of stored pictures, with which the pages show them.

A picture of 8192 x 8192 is 200 MB of pixels, too many for a browser to move smoothly. So it is cut
once, when somebody first looks at it. The tiles lie in a folder under the hash of the file, and are
removed when the file is, or when nobody has looked for a day.

The work is done in a process of its own. Decoding takes memory, which goes back to the system when
that process ends; the server's own process never loads numpy or Pillow.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from tegula.errors import ImageError, NotFoundError
from tegula.server.blobs import Blobs
from tegula.server.tables import FileRecord

_KEPT_S = 86_400.0
_IDLE_S = 60.0
"""Without work, after which the process ends."""
_PATIENCE_S = 300.0
_MANIFEST = "manifest.json"
"""As ``tegula.images.tiles`` calls it, which is not imported here for the sake of Pillow."""
_THUMBNAIL = "thumbnail.jpg"

_Work = Literal["cut_tiles", "draw_thumbnail"]


class Tiles:
    """Tiles and thumbnails of stored files.

    folder: where they lie.
    max_pixels: of the largest picture that is decoded.
    """

    def __init__(self, folder: Path, blobs: Blobs, max_pixels: int) -> None:
        self._folder = folder
        self._blobs = blobs
        self._max_pixels = max_pixels
        self._lock = threading.Lock()
        self._building: dict[Path, Future[None]] = {}
        self._process: ProcessPoolExecutor | None = None
        self._idle: threading.Timer | None = None

    def manifest(self, file: FileRecord) -> dict[str, Any]:
        """Return size, levels and settings of a picture, whose tiles are there from then on.

        Raises:
            ImageError: it cannot be decoded.
            NotFoundError: its bytes are gone.
            PathError: they cannot be read.
        """
        path = self._path(file.sha256) / "levels"
        self._build(file, path, "cut_tiles")
        os.utime(path.parent)  # somebody looked
        found: dict[str, Any] = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        return found

    def tile(self, file: FileRecord, level: int, name: str) -> Path:
        """Return a tile by its name, such as ``3-0.png``: column and row.

        Raises:
            NotFoundError: there is none, or the tiles have not been cut.
        """
        path = self._path(file.sha256) / "levels" / str(level) / name
        if not path.is_file():
            raise NotFoundError("There is no such tile.")
        return path

    def thumbnail(self, file: FileRecord) -> Path:
        """Return a small JPEG of a picture.

        Raises:
            ImageError, NotFoundError: as ``manifest`` does.
        """
        path = self._path(file.sha256) / _THUMBNAIL
        self._build(file, path, "draw_thumbnail")
        return path

    def clean(self, used: Callable[[Collection[str]], Collection[str]]) -> None:
        """Remove what belongs to no file any more, or has not been looked at for long.

        ``used`` returns those of some hashes that are of files.
        """
        found = {path.name: path for path in self._folder.glob("??/*")}
        kept = used(found)
        for name, path in found.items():
            with contextlib.suppress(OSError):
                if name not in kept or time.time() - path.stat().st_mtime > _KEPT_S:
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            process, self._process = self._process, None
            if self._idle is not None:
                self._idle.cancel()
        if process is not None:
            process.shutdown(wait=False, cancel_futures=True)

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def _build(self, file: FileRecord, path: Path, work: _Work) -> None:
        """Do some work in the process, unless it has been done; once for all who wait for it."""
        if path.exists():
            return
        source = self._blobs.path(file.sha256)
        if not source.exists():
            raise NotFoundError("The bytes of the file are gone.")
        with self._lock:
            future = self._building.get(path)
            if future is None:
                if self._process is None:
                    self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
                if self._idle is not None:
                    self._idle.cancel()
                path.parent.mkdir(parents=True, exist_ok=True)
                future = self._process.submit(_call, work, source, path, self._max_pixels)
                self._building[path] = future
        try:
            future.result(_PATIENCE_S)
        except (BrokenProcessPool, FutureTimeoutError) as error:
            self.close()
            raise ImageError("The picture is too large to show here; download it.") from error
        finally:
            self._finished(path)

    def _finished(self, path: Path) -> None:
        with self._lock:
            self._building.pop(path, None)
            if not self._building and self._process is not None:
                if self._idle is not None:
                    self._idle.cancel()
                self._idle = threading.Timer(_IDLE_S, self.close)
                self._idle.daemon = True
                self._idle.start()


def _call(work: _Work, source: Path, path: Path, max_pixels: int) -> None:
    """Do some work of ``tegula.images.tiles``, which only the process loads."""
    from tegula.images import tiles

    getattr(tiles, work)(source, path, max_pixels)
