"""What every test runs under; nothing here loads torch, so that tests without it stay quick."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TEGULA_THREADS", "1")
os.environ.setdefault("TEGULA_LAYOUT", "contiguous")
