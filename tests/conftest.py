"""What every test runs under; nothing here loads torch, so that tests without it stay quick."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

# Hypothesis gives each example 200 ms and ten of them a second to be drawn, which a busy machine
# exceeds through no fault of the code.
settings.register_profile("tegula", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tegula")

# Looking for garbage in what is imported took a fifth of the processor time of the tests after it.
gc.disable()


class _FilesInTheirPlaces(LoadFileScheduling):  # type: ignore[misc]
    """Gives each process whole files, and half of the workbench's to one, which starts its server.

    In one process they would end after all others; in more of them each loads the packaged model.
    """

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        name = Path(file).name
        if not name.startswith("test_workbench_"):
            return file
        return "workbench: a to h" if name < "test_workbench_i" else "workbench: i to z"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _FilesInTheirPlaces:
    """Distribute the files of tests."""
    return _FilesInTheirPlaces(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files of ``end_to_end/``, which wait for half their time, beside those that compute.

    Were they all first, processors would be idle meanwhile, and too few for what comes afterwards.
    The chaos tests and the workbench's take the longest, and come first so as not to be last.
    """
    files = dict.fromkeys(item.path for item in items)
    waiting = [file for file in files if "end_to_end" in file.parts]
    waiting.sort(key=lambda file: not any(word in file.name for word in ("chaos", "workbench")))
    computing = [file for file in files if file not in waiting]
    # Three to one leaves enough that computes for the end.
    places = {file: 4 * place for place, file in enumerate(waiting)}
    places |= {file: place // 3 * 4 + 1 for place, file in enumerate(computing)}
    items.sort(key=lambda item: places[item.path])


def pytest_collection_finish() -> None:
    """Look for garbage from now on, in what tests make alone."""
    gc.enable()
    gc.freeze()


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TEGULA_THREADS", "1")
os.environ.setdefault("TEGULA_LAYOUT", "contiguous")
os.environ["TEGULA_CONFIG"] = ""  # the user's own defaults are none of the tests'

if "TEGULA_CACHE" not in os.environ:
    # Every upscale leaves how long it took, and tests are no measure of the user's machine.
    os.environ["TEGULA_CACHE"] = tempfile.mkdtemp(prefix="tegula-cache-")
    atexit.register(shutil.rmtree, os.environ["TEGULA_CACHE"], ignore_errors=True)
