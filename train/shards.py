"""Files of pairs: a folder of shards, each seeded on its own and written whole or not at all.

Whatever stops a run, the next one makes the shards that are missing, and the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

OnShard = Callable[[int, int], None]
"""Called with how many shards there are by now, and how many there will be."""


def ignore_shard(done: int, total: int) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Shards:
    """The shards of a folder, whether they are there or not.

    name: of a file, with a place for its number, such as ``pairs-{:03d}.npy``.
    count: pairs of all shards.
    each: pairs of one; the last may have fewer.
    """

    folder: Path
    name: str
    count: int
    each: int

    @property
    def total(self) -> int:
        """How many shards there are."""
        return -(-self.count // self.each)

    def missing(self) -> list[int]:
        """Return the numbers of those that are not there yet; makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return [shard for shard in range(self.total) if not self._path(shard).exists()]

    def pairs_in(self, shard: int) -> int:
        """Return how many pairs a shard has."""
        return min(self.each, self.count - shard * self.each)

    def write(self, shard: int, save: Callable[[BinaryIO], None]) -> None:
        """Write a shard by what saves it into a file."""
        path = self._path(shard)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            save(file)
        part.replace(path)

    def _path(self, shard: int) -> Path:
        return self.folder / self.name.format(shard)
