"""Live scheduling on this machine: GETs among long RANGEs of a real RocksDB on one CPU, under the kernel's own scheduler and under Wave's.

The workers are processes on the first CPU; on the second are the client, which sleeps between sends of an open-loop Poisson load, and what polls: the agent,
or in the kernel's columns an ordinary process, so that both find the same machine. All schedulers get the same requests (equal seeds), in turns; a figure is
the median over the rounds, its spread (smallest and largest) is in `spread`. Latencies count from when a request was to be sent.

saturation     the highest offered load whose backlog stays bounded: drained within 1 % of `saturation_s` after the last send
at 70 %        of the saturation of the kernel's default
predicted_     by the emulator, from costs that were measured here one by one (bench/live_costs.py), none of them from the loads that it predicts
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any

from waveos.bench import live_costs, live_prediction, live_schedulers
from waveos.bench.live_schedulers import KERNEL, TUNED
from waveos.bench.live_window import Window, look_back, read_usage
from waveos.bench.machine import describe_machine
from waveos.cli.terminal import talk
from waveos.errors import ConfigError
from waveos.host import rocksdb
from waveos.host.service import Service, client_on, draw_load

OPTIONS = {
    "seed": (1, "seed of all loads"),
    "rounds": (5, "interleaved rounds at 70 % load; figures are medians over them"),
    "seconds": (4.0, "length of a round"),
    "saturation_s": (20.0, "length of a window of the search for saturation"),
    "workers": (16, "worker processes"),
    "quick": (False, "3 rounds of 1 s, saturation over 2 s: for a look and for CI, not for figures"),
}
RANGE_SHARE = 0.005
LOAD_SHARE = 0.7
PREDICTED_SHARES = (0.3, 0.6, 0.8)
MOST_PER_S = 150_000
"""What the board has room for; no interpreter serves that many."""
STEP = 0.03
"""Between two loads of the search for saturation."""
BACKLOG_SHARE, LEAST_BACKLOG_NS = 0.01, 60_000_000
"""A backlog is bounded that is drained within this share of the window; a queue near saturation is some 20 ms long by itself."""


@dataclass(frozen=True)
class Plan:
    """The benchmark's options, and where things run."""

    seed: int
    rounds: int
    seconds: float
    saturation_s: float
    workers: int
    host_core: int
    agent_core: int


def run(seed: int = 1, rounds: int = 5, seconds: float = 4.0, saturation_s: float = 20.0, workers: int = 16, quick: bool = False) -> dict[str, Any]:
    """Measure all schedulers. Raises ConfigError on fewer than two CPUs or without the right to set scheduling policies, MissingError without rocksdict."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ConfigError("bench live needs two CPUs, one for the workers and one for agent and client; this process may use one")
    if rounds < 1 or seconds < 0.2 or saturation_s < 1 or not 2 <= workers <= 64:
        raise ConfigError(
            f"rounds {rounds}, seconds {seconds}, saturation_s {saturation_s}, workers {workers}: at least 1, 0.2, 1, and 2 to 64 workers"
        )
    if os.geteuid() != 0:
        raise ConfigError("bench live sets scheduling policies of its workers and client, for which one must be root: sudo wave bench live")
    if quick:
        rounds, seconds, saturation_s = min(rounds, 3), min(seconds, 1.0), min(saturation_s, 2.0)
    plan = Plan(seed, rounds, seconds, saturation_s, workers, cores[0], cores[1])
    capacity = round(MOST_PER_S * max(seconds, saturation_s, 1.0) * 1.2)
    _tell("building the database")
    with (
        rocksdb.database() as folder,
        Service(folder, workers=workers, core=plan.host_core, capacity=capacity) as service,
        client_on(plan.agent_core),
    ):
        return _Bench(plan, service).measure()


class _Bench:
    """One run: the service is up, the client is where it belongs."""

    def __init__(self, plan: Plan, service: Service) -> None:
        self.plan, self.service = plan, service
        self.columns = [KERNEL, *TUNED]

    def measure(self) -> dict[str, Any]:
        _tell("measuring costs one by one")
        costs = live_costs.measure(self.service, self.plan.host_core, self.plan.agent_core, self.plan.seed)
        _tell("saturation of the kernel's default")
        saturations = {KERNEL: self._saturation(KERNEL, costs.capacity_per_s)}
        rate = LOAD_SHARE * saturations[KERNEL]
        windows: dict[str, list[Window]] = {name: [] for name in self.columns}
        for number in range(self.plan.rounds):
            _tell(f"round {number + 1} of {self.plan.rounds} at {rate:,.0f} requests/s")
            for name in self.columns:
                windows[name].append(self._window(name, rate, self.plan.seconds, self.plan.seed + number))
        figures = {name: _medians(each) for name, each in windows.items()}
        tuned = min(TUNED, key=lambda name: figures[name].get_p99_us)
        _tell(f"saturation of the best tuned kernel, {tuned}")
        saturations[tuned] = self._saturation(tuned, saturations[KERNEL])
        metrics: dict[str, Any] = {
            "rate_per_s": rate,
            "saturation_kernel_per_s": saturations[KERNEL],
            "saturation_kernel_tuned_per_s": saturations[tuned],
        }
        spread: dict[str, list[float]] = {}
        for label, name in ((KERNEL, KERNEL), ("kernel_tuned", tuned)):
            for key in (
                "get_p50_us",
                "get_p99_us",
                "range_p50_us",
                "range_p99_us",
                "throughput_per_s",
                "throttled_share",
                "busy_share",
                "foreign_share",
            ):
                values = [getattr(each, key) for each in windows[name]]
                metrics[f"{label}_{key}"] = median(values)
                spread[f"{label}_{key}"] = [min(values), max(values)]
        metrics |= costs.metrics()
        metrics |= self._predict(costs, saturations[KERNEL])
        return {
            "name": "live",
            "metrics": metrics,
            "machine": describe_machine(),
            "timing": "measured",
            "tuned": tuned,
            "spread": spread,
            "windows": {name: [asdict(each) for each in of] for name, of in windows.items()},
            "costs": costs.describe(),
            "verdict": _conclude(metrics, tuned),
        }

    def _window(self, name: str, rate_per_s: float, seconds: float, seed: int) -> Window:
        """One scheduler under one load."""
        load = draw_load(rate_per_s, round(seconds * 1e9), RANGE_SHARE, rocksdb.ENTRIES, rocksdb.RANGE_ENTRIES, seed)
        with live_schedulers.kernel(self.service, name, self.plan.agent_core) as groups:
            before = read_usage(self.service.pids, self.plan.host_core)
            served = self.service.serve(load, groups)
            after = read_usage(self.service.pids, self.plan.host_core)
        return look_back(served, before, after)

    def _saturation(self, name: str, guess_per_s: float) -> float:
        """The highest load with a bounded backlog, in steps of 3 % around what comes out under too much load."""
        seconds = self.plan.saturation_s
        load = self._window(name, 1.3 * guess_per_s, max(1.0, seconds / 10), self.plan.seed).throughput_per_s
        best = 0.0
        for _ in range(8):
            window = self._window(name, load, seconds, self.plan.seed)
            bounded = window.backlog_ns <= max(LEAST_BACKLOG_NS, BACKLOG_SHARE * seconds * 1e9)
            if bounded:
                best = max(best, window.offered_per_s)
                load *= 1 + STEP
            elif best:
                break
            else:
                load *= 1 - STEP
        return best

    def _predict(self, costs: live_costs.Costs, saturation_per_s: float) -> dict[str, float]:
        """Measured beside predicted, for the kernel's default."""
        metrics: dict[str, float] = {}
        for share in PREDICTED_SHARES:
            rate = share * saturation_per_s
            _tell(f"measured and predicted at {rate:,.0f} requests/s")
            measured = _medians(
                [self._window(KERNEL, rate, self.plan.seconds, self.plan.seed + number) for number in range(min(3, self.plan.rounds))]
            )
            predicted = live_prediction.predict(costs, rate, self.plan.workers, self.plan.seed)
            for key, value in predicted.items():
                metrics[f"predicted_kernel_{key}_{share * 100:.0f}"] = value
                metrics[f"measured_kernel_{key}_{share * 100:.0f}"] = getattr(measured, key)
        metrics["predicted_saturation_kernel_per_s"] = live_prediction.saturation(costs, self.plan.workers, self.plan.seed)
        metrics["measured_saturation_kernel_per_s"] = saturation_per_s
        return metrics


def _medians(windows: list[Window]) -> Window:
    """Figure by figure."""
    return Window(*(median(getattr(each, field.name) for each in windows) for field in fields(Window)))


def _conclude(metrics: dict[str, Any], tuned: str) -> str:
    return f"kernel GET p99 {metrics['kernel_get_p99_us']:,.0f} us, tuned ({tuned}) {metrics['kernel_tuned_get_p99_us']:,.0f} us"


def _tell(line: str) -> None:
    talk(f"live: {line} ...")
