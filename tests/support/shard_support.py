"""Helpers in threads of this process, which are sent everything as bytes."""

import pickle
import threading
from collections import Counter

from tegula.nets import Nets
from tegula.pipeline.shards import HelperNets, Shards, run_task
from tegula.progress import Cancel


class HereHelper:
    """Runs tasks with a bundle as a helper elsewhere would; ``refuse`` may raise before one."""

    def __init__(self, name, bundle, refuse=lambda helper: None):
        self.name, self.refuse = name, refuse
        self.nets = HelperNets(bundle, Nets(bundle).prescaler)
        self.ran, self.sent = Counter(), Counter()
        self.tasks = []
        self.began = threading.Event()

    def run(self, task, given_up):
        self.began.set()
        self.refuse(self)
        message = pickle.dumps(task)
        kind = type(task).__name__
        self.ran[kind] += 1
        self.sent[kind] += len(message)
        self.tasks.append(task)
        results = run_task(pickle.loads(message), self.nets, Cancel(given_up))
        return pickle.loads(pickle.dumps(results))


def shards_of(*helpers):
    """Return what spreads over helpers that are always free."""
    return Shards(lambda: helpers)
