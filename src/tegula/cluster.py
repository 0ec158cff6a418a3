"""Joining a cluster of Ray, or starting one on this machine; Ray is an extra."""

from __future__ import annotations

import logging
import os
import signal
import threading

from tegula.errors import MissingExtraError, ServiceError

ADDRESS_VARIABLE = "RAY_ADDRESS"
OBJECT_STORE = 128 << 20
"""Bytes of a cluster of one's own: little travels, and Ray would reserve a third of memory."""


def join_cluster(needs: str, own_store: int = OBJECT_STORE) -> bool:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one of this machine.

    Args:
        needs: what needs Ray, as a sentence begins with it.
        own_store: bytes of the object store of a cluster of this machine.

    Returns:
        Whether this process had not joined one before.

    Raises:
        MissingExtraError: Ray is not installed.
        ServiceError: the cluster does not answer.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(f"{needs} needs Ray: pip install 'tegula[ray]'.") from error
    if ray.is_initialized():
        return False
    # Nothing is reported to anybody unless the operator says so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get(ADDRESS_VARIABLE, "")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    own = {"include_dashboard": False, "object_store_memory": own_store}
    try:
        # Without an address Ray would join whatever cluster it finds on this machine.
        ray.init(
            address=address or "local",
            namespace="tegula",
            log_to_driver=False,
            logging_level=logging.WARNING,
            **({} if address and address != "local" else own),
        )
    except Exception as error:  # Ray raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = f"The Ray cluster at {address} (RAY_ADDRESS)" if address else "A Ray cluster"
        raise ServiceError(f"{where} cannot be used: {reason}.") from error
    if on_sigterm is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in the place
    return True
