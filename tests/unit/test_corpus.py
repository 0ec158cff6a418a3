"""The command that reads a folder of files people have."""

from __future__ import annotations

import sys

import numpy as np
from PIL import Image

from tests import corpus


def folder_of_files(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    for name in ("a.png", "sub/b.bmp", "sub/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / name, lossless=True)
    for number in range(3):
        (tmp_path / f"{number}.pdf").write_bytes(b"%PDF-1.7 " + bytes(64))
    Image.fromarray(values).save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    return values


def test_refusals_are_counted_by_sentence(tmp_path, capsys, monkeypatch):
    folder_of_files(tmp_path)
    monkeypatch.setitem(sys.modules, "pyvips", None)
    assert corpus.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "7 files: 3 read" in printed
    assert "    3 FILE is a PDF document, which is not supported" in printed
    assert "    1 FILE is a damaged or truncated image" in printed
    assert "not compared: pip install pyvips" in printed


def test_differences_to_another_reader_are_named(tmp_path):
    values = folder_of_files(tmp_path)
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())

    def other(file):
        return values // 2 if file.name == "b.bmp" else values if file.name == "a.png" else None

    found = corpus.examine(files, other)
    assert (found.read, found.compared, found.crashed, found.headers) == (3, 2, {}, [])
    assert list(found.differing) == [tmp_path / "sub/b.bmp"]
    assert 100 < found.differing[tmp_path / "sub/b.bmp"] <= 128


def test_what_is_no_sentence_is_a_crash(tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise KeyError("odd")

    folder_of_files(tmp_path)
    monkeypatch.setattr(corpus, "decode", broken)
    assert corpus.main([str(tmp_path)]) == 1
    assert "crashed: 7" in capsys.readouterr().out
