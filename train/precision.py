"""Mixed precision where the device gains by it."""

from __future__ import annotations

import torch

from tegula.models.device import pick_dtype


def mixed_precision(device: torch.device) -> torch.autocast:
    """Return a context that computes in bfloat16 where the device multiplies it natively.

    Elsewhere it changes nothing: a processor without such units is slower in bfloat16 than in
    float32, by a factor of sixteen for a whole step.
    """
    fast = pick_dtype(device) == torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)
