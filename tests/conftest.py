"""What every test runs under; nothing here loads torch, so that tests without it stay quick."""

import atexit
import gc
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings

# Hypothesis gives each example 200 ms and ten of them a second to be drawn, which a busy machine
# exceeds through no fault of the code.
settings.register_profile("tegula", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tegula")

# Looking for garbage in what is imported took a fifth of the processor time of the tests after it.
gc.disable()


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
