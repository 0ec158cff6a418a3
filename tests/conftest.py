import os

import torch

pytest_plugins = ["api_support", "sd15_support"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TEGULA_THREADS", "1")
os.environ.setdefault("TEGULA_LAYOUT", "contiguous")
torch.set_num_threads(1)
