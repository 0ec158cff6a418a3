"""``python -m bench.scheduling``: how the queue shares many devices, simulated without a model.

Predictions of four accounts, of seconds that nobody knows before, wait for simulated devices, of
which some fail in the middle of a run. Everything else is real: the queue, its database and its
turns. The clock jumps from event to event, so an hour of 256 devices takes minutes here.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from tegula.server.predictions import NewPrediction
from tegula.server.settings import ServerSettings
from tegula.server.store import Store

_BEGIN = datetime(2026, 1, 1, tzinfo=timezone.utc)
_REPAIR_S = 60.0
"""How long a device that failed is away."""
_MODELS = ("ab" * 32, "cd" * 32)

WEIGHTS = {"ada": 1.0, "bob": 1.0, "cleo": 2.0, "dan": 4.0}


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to.

    makespan: seconds from the first prediction to the end of the last.
    ideal: seconds of all runs and repairs, over the number of devices.
    shares: of the devices' seconds while all accounts had work waiting, by username.
    wanted: the shares that the weights ask for.
    ended: how many predictions succeeded.
    losses: runs in which the device failed.
    """

    makespan: float
    ideal: float
    shares: Mapping[str, float]
    wanted: Mapping[str, float]
    ended: int
    losses: int


def simulate(
    folder: Path,
    predictions: int = 10_000,
    devices: int = 256,
    failures: float = 0.02,
    seed: int = 0,
) -> Outcome:
    """Run predictions of all accounts, as many of each, until the last has ended.

    Args:
        folder: for the database.
        predictions: of all accounts together; all wait from the beginning.
        devices: simulated.
        failures: share of runs in which the device fails; a prediction is lost once at most.
        seed: of how long predictions run and which runs fail.
    """
    chance, now = random.Random(seed), _BEGIN
    settings = ServerSettings(
        folder=folder,
        account_weights=WEIGHTS,
        max_waiting=predictions,
        max_account_waiting=predictions,
        max_waiting_seconds=1e9,
        max_account_waiting_seconds=1e9,
        lease_seconds=1e6,
    )
    store = Store.open(settings, clock=lambda: now)
    names = {store.accounts.ensure(name).id: name for name in WEIGHTS}
    waiting = dict.fromkeys(names.values(), 0)
    for account in list(names) * (predictions // len(names)):
        model = chance.choice(_MODELS)
        new = NewPrediction(account, "tegula/upscale", model, {}, estimated_seconds=20.0)
        store.predictions.create(new)
        waiting[names[account]] += 1
    number = itertools.count()
    # Moments at which a device becomes free, with the run that it ends then.
    free: list[tuple[float, int, str, tuple[str, int, str, bool] | None]] = [
        (0.0, next(number), f"device-{i}", None) for i in range(devices)
    ]
    served: defaultdict[str, float] = defaultdict(float)
    busy, ended, losses, lost, idle = 0.0, 0, 0, set[str](), list[str]()
    loaded: dict[str, str] = {}
    last = 0.0
    while free:
        moment, _, device, run = heapq.heappop(free)
        now, last = _BEGIN + timedelta(seconds=moment), moment
        if run is not None:
            prediction, attempt, name, failed = run
            if failed:
                store.queue.lose(prediction, attempt, "simulated")
                waiting[name] += 1
                heapq.heappush(free, (moment + _REPAIR_S, next(number), device, None))
                for other in idle:
                    heapq.heappush(free, (moment, next(number), other, None))
                idle.clear()
                continue
            ended += store.queue.succeed(prediction, attempt)
        claimed = store.queue.claim(device, [loaded[device]] if device in loaded else [])
        if claimed is None:
            idle.append(device)
            continue
        store.queue.start(claimed.id, claimed.attempt)
        loaded[device], name = claimed.version, names[claimed.account_id]
        seconds, failed = _draw_run(chance, failures, may_fail=claimed.id not in lost)
        if failed:
            lost.add(claimed.id)
            losses += 1
        busy += seconds
        waiting[name] -= 1
        if all(waiting.values()):
            served[name] += seconds
        run = (claimed.id, claimed.attempt, name, failed)
        heapq.heappush(free, (moment + seconds, next(number), device, run))
    store.close()
    total, weights = sum(served.values()), sum(WEIGHTS.values())
    return Outcome(
        makespan=last,
        ideal=(busy + losses * _REPAIR_S) / devices,
        shares={name: served[name] / total for name in WEIGHTS},
        wanted={name: weight / weights for name, weight in WEIGHTS.items()},
        ended=ended,
        losses=losses,
    )


def _draw_run(chance: random.Random, failures: float, *, may_fail: bool) -> tuple[float, bool]:
    """Return the seconds of a run and whether its device fails, at any moment of it.

    Seconds are spread as those of pictures are: most near 20, some of a minute and more.
    """
    seconds, fails = chance.lognormvariate(3.0, 0.5), chance.random() < failures
    if not (fails and may_fail):
        return seconds, False
    return seconds * chance.random(), True


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.scheduling", description=__doc__)
    parser.add_argument("--predictions", type=int, default=10_000)
    parser.add_argument("--devices", type=int, default=256)
    parser.add_argument("--failures", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcome = simulate(
            Path(folder),
            arguments.predictions,
            arguments.devices,
            arguments.failures,
            arguments.seed,
        )
    print(f"{outcome.ended} succeeded; {outcome.losses} runs lost with their device")
    print(f"makespan {outcome.makespan:.0f} s, {outcome.makespan / outcome.ideal:.3f} of ideal\n")
    print("| account | weight | share wanted | share of the seconds while all waited |")
    print("|---|---|---|---|")
    for name, weight in WEIGHTS.items():
        wanted, got = outcome.wanted[name], outcome.shares[name]
        print(f"| {name} | {weight:g} | {wanted:.1%} | {got:.1%} |")


if __name__ == "__main__":
    main()
