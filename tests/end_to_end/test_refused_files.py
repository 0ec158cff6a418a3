"""Files that hold no weights are refused before torch or diffusers is imported."""

import os
import struct
import subprocess
import sys
import zipfile

import pytest
from PIL import Image

CONTENTS = {
    "page.safetensors": (b"<!DOCTYPE html><html>Log in</html>", "is a web page, not"),
    "text.ckpt": (b"just some words", "is damaged, or no file of weights"),
    "empty.safetensors": (b"", "is an empty file, not"),
    "cut.safetensors": (
        struct.pack("<Q", 62)
        + b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'.ljust(62),
        "has 70 bytes where its header promises 86",
    ),
    "note.txt": (b"words", r"is a file ending in .txt, not a"),
}
OPTIONS = ("--model", "--controlnet", "--vae", "--lora", "--embedding", "--prescaler")

RUN = """
import sys
from tegula.cli import main
sys.argv = ["tegula", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    print("status", end.code)
print("imported", [name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


@pytest.fixture
def folder(tmp_path):
    for name, (content, _) in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "archive.pt", "w") as archive:
        archive.writestr("readme.txt", "words")
    Image.new("RGB", (4, 4)).save(tmp_path / "in.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.jpg")
    return tmp_path


def run(folder, *words, code=RUN):
    settings = {**os.environ, "TEGULA_MODELS": str(folder / "models"), "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        env=settings,
        cwd=folder,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("option", "name"),
    [
        *zip(OPTIONS, [*list(CONTENTS)[:4], "note.txt", "page.safetensors"], strict=True),
        ("--lora", "picture.jpg"),
        ("--vae", "picture.jpg"),
        ("--embedding", "archive.pt"),
        ("--few-step", "page.safetensors"),
    ],
)
def test_a_command_refuses_them_without_importing_anything(folder, option, name):
    others = [] if option in ("--model", "--prescaler") else ["--model", "none/at-all"]
    done = run(folder, "upscale", "in.png", "out.png", option, name, *others)
    assert "imported []" in done.stdout, done.stdout + done.stderr
    assert "status 6" in done.stdout
    sentence = CONTENTS.get(name, (b"", "is a "))[1]
    assert name in done.stderr
    assert sentence in done.stderr
    assert done.stderr.count(". ") + done.stderr.count("\n") <= 2


def test_a_folder_in_place_of_a_lora_is_told_so(folder):
    (folder / "many").mkdir()
    done = run(folder, "upscale", "in.png", "out.png", "--model", "none/at-all", "--lora", "many")
    assert "many is a folder, not a LoRA file; give the file in it." in done.stderr
    assert "imported []" in done.stdout


def test_loading_in_python_refuses_them_before_diffusers_is_imported(folder):
    code = (
        "import sys, tegula\n"
        "try: tegula.Upscaler.load(sys.argv[1])\n"
        "except tegula.TegulaError as error: print(error.code, error)\n"
        "print('imported', [n for n in ('diffusers', 'transformers') if n in sys.modules])"
    )
    done = run(folder, "page.safetensors", code=code)
    assert "is a web page" in done.stdout, done.stderr
    assert "imported []" in done.stdout


def test_a_server_checks_them_before_anything_is_imported(folder):
    code = (
        "import sys\n"
        "from tegula.models import BundleSettings\n"
        "from tegula.models.load import check_bundle\n"
        "try: check_bundle(BundleSettings(bundle='x/y', vae=sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print('imported', [n for n in ('torch', 'diffusers') if n in sys.modules])"
    )
    done = run(folder, "cut.safetensors", code=code)
    assert "BrokenWeightsError" in done.stdout, done.stderr
    assert "header promises" in done.stdout
    assert "imported []" in done.stdout
