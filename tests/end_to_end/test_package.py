"""What installing tegula brings along."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tegula

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there():
    for name in tegula.__all__:
        assert getattr(tegula, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        tegula.nonsense  # noqa: B018


def test_importing_tegula_does_not_import_torch():
    code = "import sys, tegula; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_wheel_carries_all_that_the_default_needs(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("tegula-*.whl")
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    packaged = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packaged <= names
    assert "tegula/models/mini/weights/mini.safetensors" in names
    assert "tegula/py.typed" in names
    info = f"tegula-{tegula.__version__}.dist-info"
    assert {f"{info}/licenses/LICENSE"} < {name for name in names if "/licenses/" in name}
    head, _, page = archive.read(f"{info}/METADATA").decode().partition("\n\n")
    assert "Keywords: " in head
    assert page.startswith("# tegula")
    assert re.findall(r"\]\((?!https?:)", page) == []  # an index has none of the repository's files
