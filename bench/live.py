"""Live scheduling on this machine: GETs among long RANGEs of a real RocksDB on one CPU, under the kernel's own scheduler and under Wave's.

The workers are processes on the first CPU; on the second are the client, which sleeps between sends of an open-loop Poisson load, and what polls: the agent,
or in the kernel's columns an ordinary process, so that both find the same machine. All schedulers get the same requests (equal seeds), in turns; a figure is
the median over the rounds, its spread (smallest and largest) is in `spread`. Latencies count from when a request was to be sent. A window in which other
programs took more than 5 % of the host CPU is repeated, twice at most, and the quietest counts; `noisy_share` says how many were noisy all the same. Where
the CPU itself was slow for a while (bench/live_watch.py), requests of that busy period are not in the latencies; `disturbed_share` says how many.

saturation     the highest offered load whose backlog stays bounded: drained within 1 % of `saturation_s` after the last send
at 70 %        of the saturation of the kernel's default
decision_      from the kernel's event until the agent has it, until it has decided, until the host has done it (agent and host count each; _rtt_ is their sum,
               drawn from the three as if independent). _event_ also by who caused it: _event_other_core_ what happens on the workers' CPU, where a thread
               blocks, ends or is switched; _event_same_core_ a wake-up by the client, which has the agent's core while it does that and until it sleeps again
runqlat_       how long the workers waited for the CPU once they could run, as the kernel's tracepoints say (wave probe runqlat), in windows of their own
hackbench      what hostd costs who is not in the enclave: hackbench on the same CPU, with and without, in turns
predicted_     by the emulator, from costs that were measured here one by one (bench/live_costs.py), none of them from the loads that it predicts
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.bench import live_costs, live_prediction, live_schedulers
from waveos.bench.live_schedulers import KERNEL, QUANTA_US, TUNED, WAVE, Enclave
from waveos.bench.live_watch import Watch, watching
from waveos.bench.live_window import Window, look_back, read_usage
from waveos.bench.machine import describe_machine
from waveos.cli.terminal import talk
from waveos.errors import ConfigError, MissingError, WaveError
from waveos.host import rocksdb
from waveos.host.probes import Probe, Target
from waveos.host.service import Service, client_on, draw_load

OPTIONS = {
    "seed": (1, "seed of all loads"),
    "rounds": (15, "interleaved rounds at 70 % load; figures are medians over them"),
    "seconds": (1.0, "length of a round"),
    "saturation_s": (20.0, "length of a window of the search for saturation"),
    "workers": (64, "worker processes: enough that a request seldom waits for one"),
    "quantum_us": (QUANTA_US["wave"], "of the policy shinjuku: three preemptions by hostd long"),
    "mlfq_quantum_us": (QUANTA_US["wave_mlfq"], "of the policy mlfq, which has a thread taken off its CPU once"),
    "quick": (False, "2 rounds of 1 s, fewer columns, saturation over 1 s: for a look and for CI, not for figures"),
}
BTF = Path("/sys/kernel/btf/vmlinux")
RANGE_SHARE = 0.005
LOAD_SHARE = 0.7
PREDICTED_SHARES = (0.3, 0.6, 0.8)
PREDICTED_ROUNDS = 7
MOST_PER_S = 150_000
"""What the board has room for; no interpreter serves that many."""
FIGURES = (
    "get_p50_us",
    "get_p99_us",
    "range_p50_us",
    "range_p99_us",
    "throughput_per_s",
    "late_p50_us",
    "throttled_share",
    "busy_share",
    "foreign_share",
    "stolen_share",
    "disturbed_share",
)
QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
DRAWN = 200_000
NOISY_SHARE = 0.05
HACKBENCH_LOOPS = 15_000
COSTS_S, ENCLAVE_S = 12.0, 3.0
"""Of the experiments for the emulator, and of an enclave's coming and going; for what is told of the whole's length alone."""
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
    probes: int
    tries: int
    tuned: tuple[str, ...]
    shares: tuple[float, ...]  # of saturation, at which the emulator is asked
    workers: int
    quanta_us: dict[str, float]  # of Wave's columns
    host_core: int
    agent_core: int
    began_s: float = field(default_factory=time.monotonic)


def run(
    seed: int = 1,
    rounds: int = 15,
    seconds: float = 1.0,
    saturation_s: float = 20.0,
    workers: int = 64,
    quantum_us: float = QUANTA_US["wave"],
    mlfq_quantum_us: float = QUANTA_US["wave_mlfq"],
    quick: bool = False,
) -> dict[str, Any]:
    """Measure all schedulers. Raises ConfigError on fewer than two CPUs or without the right to set scheduling policies, MissingError without rocksdict."""
    if reason := why_not():
        raise ConfigError(f"bench live {reason}")
    if rounds < 1 or seconds < 0.2 or saturation_s < 1 or not 2 <= workers <= 64 or min(quantum_us, mlfq_quantum_us) <= 0:
        raise ConfigError(
            f"rounds {rounds}, seconds {seconds}, saturation_s {saturation_s}, workers {workers}, quantum_us {quantum_us}, mlfq_quantum_us {mlfq_quantum_us}: "
            "at least 1, 0.2 and 1, 2 to 64 workers, and a quantum above 0"
        )
    if quick:
        rounds, seconds, saturation_s = min(rounds, 2), min(seconds, 1.0), min(saturation_s, 1.0)
    probes, tries, tuned, shares = (3, 1, TUNED[-1:], PREDICTED_SHARES[1:2]) if quick else (8, 3, TUNED, PREDICTED_SHARES)
    host_core, agent_core = sorted(os.sched_getaffinity(0))[:2]
    quanta_us = dict(zip(WAVE, (quantum_us, mlfq_quantum_us), strict=True))
    with begin(Plan(seed, rounds, seconds, saturation_s, probes, tries, tuned, shares, workers, quanta_us, host_core, agent_core)) as bench:
        return bench.measure()


def why_not() -> str | None:
    """Why nothing live can be measured here, in half a sentence."""
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two CPUs, one for the workers and one for agent and client; this process may use one"
    if os.geteuid() != 0:
        return "sets scheduling policies of its workers and client, for which one must be root (sudo)"
    if not BTF.exists():
        return f"needs a kernel that describes its types ({BTF}), for BPF programs that fit it"
    return None


@contextlib.contextmanager
def begin(plan: Plan) -> Iterator[Bench]:
    """The service is up, the client is where it belongs."""
    capacity = round(MOST_PER_S * max(plan.seconds, plan.saturation_s, 1.0) * 1.2)
    machine = describe_machine()  # before the client is bound to one core
    _tell(plan, "building the database")
    with (
        rocksdb.database() as folder,
        Service(folder, workers=plan.workers, core=plan.host_core, capacity=capacity) as service,
        watching(plan.host_core) as watch,
        client_on(plan.agent_core),
    ):
        yield Bench(plan, service, watch, machine)


class Bench:
    """One run."""

    def __init__(self, plan: Plan, service: Service, watch: Watch, machine: dict[str, object]) -> None:
        self.plan, self.service, self.watch, self.machine = plan, service, watch, machine
        self.told: dict[str, list[dict[str, Any]]] = {name: [] for name in WAVE}  # by hostd, a window each
        self.noisy: list[bool] = []  # whether a window was, by number

    def measure(self) -> dict[str, Any]:
        plan = self.plan
        talk(f"live: at most some {expected_s(plan) / 60:.0f} minutes if the machine is quiet; lines say how many have passed")
        _tell(plan, "measuring costs one by one")
        costs = self._costs()
        _tell(plan, "saturation of the kernel's default")
        saturations = {KERNEL: self._saturation(KERNEL, costs.capacity_per_s)}
        rate = LOAD_SHARE * saturations[KERNEL]
        windows: dict[str, list[Window]] = {name: [] for name in (KERNEL, *plan.tuned, *WAVE)}
        for number in range(plan.rounds):
            _tell(plan, f"round {number + 1} of {plan.rounds} at {rate:,.0f} requests/s")
            for name in windows:
                windows[name].append(self.window(name, rate, plan.seed + number))
        at_load = {name: list(told) for name, told in self.told.items()}
        tuned = min(plan.tuned, key=lambda name: median(each.get_p99_us for each in windows[name]))
        for name in (tuned, *WAVE):
            _tell(plan, f"saturation of {name}")
            saturations[name] = self._saturation(name, saturations[KERNEL])
        metrics: dict[str, Any] = {"rate_per_s": rate} | {f"{name}_quantum_us": value for name, value in plan.quanta_us.items()}
        spread: dict[str, list[float]] = {}
        for label, name in ((KERNEL, KERNEL), ("kernel_tuned", tuned), *((name, name) for name in WAVE)):
            metrics[f"{label}_saturation_per_s"] = saturations[name]
            for key in FIGURES:
                values = [getattr(each, key) for each in windows[name]]
                metrics[f"{label}_{key}"] = median(values)
                spread[f"{label}_{key}"] = [min(values), max(values)]
        metrics["throttled_share"] = metrics["wave_throttled_share"]
        metrics |= decision_times(at_load["wave"], plan.seed)
        metrics |= {"hostd_cpu_share": hostd_share(at_load["wave"]), "wave_mlfq_hostd_cpu_share": hostd_share(at_load["wave_mlfq"])}
        metrics |= self._probed((KERNEL, *WAVE), rate)
        metrics |= self._hackbench()
        metrics |= costs.metrics()
        rtt_ns = metrics.get("decision_rtt_p50_ns", 0.0)
        enforced = {name: enforcement(name, told, rtt_ns, plan.quanta_us[name]) for name, told in at_load.items()}
        metrics |= {"hostd_act_us": enforced["wave"].cpu_ns / 1_000} | self._predict(saturations, enforced)
        metrics["noisy_share"] = sum(self.noisy) / len(self.noisy)
        return {
            "name": "live",
            "metrics": metrics,
            "machine": self.machine,
            "timing": "measured",
            "tuned": tuned,
            "spread": spread,
            "windows": {name: [asdict(each) for each in of] for name, of in windows.items()},
            "costs": costs.describe(),
            "verdict": conclude(metrics, tuned),
        }

    @contextlib.contextmanager
    def _under(self, name: str) -> Iterator[Callable[[float, float, int], Window]]:
        """One scheduler over the workers: a function that serves a load (requests/s, seconds, seed) under it."""
        plan, service = self.plan, self.service

        def serve(rate_per_s: float, seconds: float, seed: int, groups: Any = None) -> Window:
            load = draw_load(rate_per_s, round(seconds * 1e9), RANGE_SHARE, rocksdb.ENTRIES, rocksdb.RANGE_ENTRIES, seed)
            before = read_usage(service.pids, plan.host_core, own)
            served = service.serve(load, groups)
            slow_ns = self.watch.slow(int(served.intended_ns[0]), int(max(served.intended_ns[-1], served.done_ns.max())))
            return look_back(served, before, read_usage(service.pids, plan.host_core, own), slow_ns)

        own: list[int] = []
        if name in WAVE:
            with Enclave(service, plan.host_core, plan.agent_core, {"quantum_us": plan.quanta_us[name]}, WAVE[name]) as enclave:
                first = enclave.status()["hostd"]
                own.append(enclave.pid)
                yield serve
                told = enclave.status()
            told["hostd"] |= {"spent_ns": told["hostd"]["cpu_ns"] - first["cpu_ns"], "spent_s": told["hostd"]["up_s"] - first["up_s"]}
            self.told[name].append(told)
        else:
            with live_schedulers.kernel(service, name, plan.agent_core) as groups:
                yield partial(serve, groups=groups)

    def window(self, name: str, rate_per_s: float, seed: int) -> Window:
        """One scheduler under one load; the quietest of a few windows if the first is noisy."""
        with self._under(name) as serve:
            return self._quietest(lambda: serve(rate_per_s, self.plan.seconds, seed))

    def _quietest(self, measure: Callable[[], Window]) -> Window:
        windows = [measure()]
        while windows[-1].foreign_share > NOISY_SHARE and len(windows) < self.plan.tries:
            windows.append(measure())
        best = min(windows, key=lambda window: window.foreign_share)
        self.noisy.append(best.foreign_share > NOISY_SHARE)
        return best

    def _probed(self, names: tuple[str, ...], rate_per_s: float) -> dict[str, float]:
        """What the kernel says of the same load, independent of what Wave and the client count; nothing where there are no probes."""
        plan, metrics = self.plan, dict[str, float]()
        for name in names:
            _tell(plan, f"{name} at {rate_per_s:,.0f} requests/s, watched by a probe")
            try:
                with self._under(name) as serve, Probe("runqlat", Target(tuple(self.service.pids))) as probe:
                    serve(rate_per_s, plan.seconds, plan.seed)
                    told = probe.stop()
            except MissingError as error:
                talk(f"live: no figures from the kernel's own probes: {error}")
                return {}
            metrics |= {f"{name}_runqlat_{which}": told[which] for which in ("p50_us", "p99_us")}
        return metrics

    def _hackbench(self) -> dict[str, float]:
        """Time of hackbench on the host CPU, with hostd there for others, as a share of that without, less 1; nothing without hackbench."""
        plan = self.plan
        if shutil.which("hackbench") is None:
            _tell(plan, "no hackbench here (package rt-tests): hostd's cost to others is not measured")
            return {}
        _tell(plan, "hackbench with and without hostd")
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(plan.rounds):
            with live_schedulers.polling(plan.agent_core):
                times[False].append(_hackbench_s(plan.host_core))
            with Enclave(self.service, plan.host_core, plan.agent_core, {"quantum_us": plan.quanta_us["wave"]}):
                times[True].append(_hackbench_s(plan.host_core))
        return {"hackbench_s": median(times[False]), "hackbench_cost_share": median(times[True]) / median(times[False]) - 1}

    def _saturation(self, name: str, guess_per_s: float) -> float:
        """The highest load with a bounded backlog, in steps of 3 % around what comes out under too much load."""
        seconds, seed = self.plan.saturation_s, self.plan.seed
        best = 0.0
        with self._under(name) as serve:
            load = serve(1.3 * guess_per_s, max(1.0, seconds / 10), seed).throughput_per_s
            for _ in range(self.plan.probes):
                window = self._quietest(partial(serve, load, seconds, seed))
                if window.backlog_ns <= max(LEAST_BACKLOG_NS, BACKLOG_SHARE * seconds * 1e9):
                    best = max(best, window.offered_per_s)
                    load *= 1 + STEP
                elif best:
                    break
                else:
                    load *= 1 - STEP
        return best or load

    def _costs(self) -> live_costs.Costs:
        return live_costs.measure(self.service, self.watch, self.plan.host_core, self.plan.agent_core, self.plan.seed)

    def _predict(self, saturations: dict[str, float], wave: dict[str, live_prediction.Enforcement]) -> dict[str, float]:
        """Measured beside predicted, for the kernel's default and for Wave's. Costs are measured anew for each load: a virtual machine is not the same for
        minutes."""
        plan, metrics = self.plan, dict[str, float]()
        for name in (KERNEL, *wave):
            enforced = wave.get(name)
            for share in plan.shares:
                rate = share * saturations[name]
                _tell(plan, f"{name} measured and predicted at {rate:,.0f} requests/s")
                costs = self._costs()
                seeds = range(plan.seed, plan.seed + min(plan.rounds, PREDICTED_ROUNDS))
                measured = medians([self.window(name, rate, seed) for seed in seeds])
                predicted = live_prediction.predict_rounds(costs, enforced, rate, plan.workers, seeds, plan.seconds)
                for key, value in predicted.items():
                    metrics[f"predicted_{name}_{key}_{share * 100:.0f}"] = value
                    metrics[f"measured_{name}_{key}_{share * 100:.0f}"] = getattr(measured, key)
            metrics[f"predicted_{name}_saturation_per_s"] = live_prediction.saturation(costs, enforced, plan.workers, plan.seed)
            metrics[f"measured_{name}_saturation_per_s"] = saturations[name]
        return metrics


def expected_s(plan: Plan) -> float:
    """How long it takes at most, where no window is repeated for noise: the searches' windows are most of it, and a search mostly ends sooner."""
    rounds, predicted = plan.rounds, len(plan.shares) * min(plan.rounds, PREDICTED_ROUNDS)
    windows = rounds * (1 + len(WAVE) + len(plan.tuned)) + 1 + len(WAVE) + (1 + len(WAVE)) * predicted
    enclaves = len(WAVE) * (rounds + 2 + predicted) + 1 + rounds
    searches = (2 + len(WAVE)) * plan.probes
    return (
        COSTS_S * (1 + (1 + len(WAVE)) * len(plan.shares))
        + windows * (plan.seconds + 0.5)
        + searches * (plan.saturation_s + 0.5)
        + enclaves * ENCLAVE_S
    )


def hostd_share(told: list[dict[str, Any]]) -> float:
    """hostd's share of its CPU, at the median of the windows."""
    return median(each["hostd"]["spent_ns"] * 1e-9 / each["hostd"]["spent_s"] for each in told)


def enforcement(name: str, told: list[dict[str, Any]], rtt_ns: float, quantum_us: float) -> live_prediction.Enforcement:
    """What a preemption costs, of what hostd told: its CPU time is that for its acts, as it does nothing else often."""
    acts = sum(each["counters"]["acts"] for each in told)
    cpu_ns = sum(each["hostd"]["spent_ns"] for each in told)
    return live_prediction.Enforcement(WAVE[name], rtt_ns, cpu_ns / max(1, acts), quantum_us)


def decision_times(told: list[dict[str, Any]], seed: int) -> dict[str, float]:
    """p50, p99 and p999 of the three parts of a decision, ns, and of their sum, from the histograms that agent and host kept."""
    reports = [each["report"] for each in told if each["report"]]
    event, wakeup = (_counts(each[name] for each in reports) for name in ("event_ns", "wakeup_ns"))
    parts = {
        "event": event,
        "decide": _counts(each["decide_ns"] for each in reports),
        "enforce": _counts(each["counters"]["enforced_ns"] for each in told),
    }
    if not all(parts.values()):
        return {}
    more = {"event_same_core": wakeup, "event_other_core": event - wakeup}
    random = np.random.default_rng(seed)
    drawn = {name: _draw(counts, random) for name, counts in (parts | more).items() if counts}
    drawn = {"rtt": np.sum([drawn[name] for name in parts], axis=0), **drawn}
    return {f"decision_{name}_{label}_ns": float(np.quantile(times, q)) for name, times in drawn.items() for label, q in QUANTILES.items()}


def _counts(histograms: Iterable[Iterable[tuple[int, int]]]) -> Counter[int]:
    """Histograms as (lower edge in ns, count), together: the count by edge."""
    total: Counter[int] = Counter()
    for histogram in histograms:
        for edge, count in histogram:
            total[edge] += count
    return total


def _draw(counts: Counter[int], random: np.random.Generator) -> NDArray[np.float64]:
    """DRAWN times that are distributed so."""
    edges, weights = np.array(list(counts.items()), np.float64).T
    return random.choice(edges, DRAWN, p=weights / weights.sum())


def _hackbench_s(core: int) -> float:
    """One hackbench on that CPU, in its own seconds."""
    command = ["hackbench", "-g", "2", "-f", "5", "-l", str(HACKBENCH_LOOPS)]

    def place() -> None:
        live_schedulers.as_others()
        os.sched_setaffinity(0, {core})

    told = subprocess.run(command, capture_output=True, text=True, check=True, preexec_fn=place).stdout
    found = re.search(r"Time: ([\d.]+)", told)
    if found is None:
        raise WaveError(f"hackbench said nothing of its time: {told.strip()}")
    return float(found[1])


def medians(windows: list[Window]) -> Window:
    """Figure by figure."""
    return Window(*(median(getattr(each, figure.name) for each in windows) for figure in fields(Window)))


def conclude(metrics: dict[str, Any], tuned: str) -> str:
    """One line: what was gained, beside the fair peer, and whether the machine was quiet enough to say so."""
    noise = max(metrics[f"{name}_foreign_share"] for name in ("kernel", "kernel_tuned", *WAVE))
    line = "; ".join(_compare(metrics, name, policy, tuned) for name, policy in WAVE.items())
    return line + (f"; other programs took {noise:.0%} of the host CPU: measure again on a quiet machine" if noise > NOISY_SHARE else "")


def _compare(metrics: dict[str, Any], name: str, policy: str, tuned: str) -> str:
    """What one of Wave's columns gains and costs."""
    p99_us, more = metrics[f"{name}_get_p99_us"], metrics[f"{name}_saturation_per_s"] / metrics["kernel_saturation_per_s"]
    plain, fair = (metrics[f"{peer}_get_p99_us"] / p99_us for peer in ("kernel", "kernel_tuned"))
    return (
        f"GET p99 under {policy} {p99_us:,.0f} us: {plain:.2f}x below the kernel's default, {fair:.2f}x below the tuned kernel ({tuned}), "
        f"saturation {more:.2f}x the default's"
    )


def _tell(plan: Plan, line: str) -> None:
    minutes, seconds = divmod(round(time.monotonic() - plan.began_s), 60)
    talk(f"live: {minutes}:{seconds:02} {line} ...")
