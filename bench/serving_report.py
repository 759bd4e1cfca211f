"""What serving looks like: TTFT against throughput of each system, hits by tier, balance of ranks, recovery, and what the link costs an iteration.

All of it is the emulated engine's: `timing: modelled`. `--out` draws it as one HTML page, `--trace` writes a timeline of batches, loads and stalls for
ui.perfetto.dev, one track for each thing that an instance does at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from waveos.bench.failsafe import setup as failsafe_setup
from waveos.bench.machine import describe_machine
from waveos.errors import ConfigError
from waveos.ipu_emulator.serving.cost import load_constants
from waveos.ipu_emulator.serving.simulate import Result, Setup, Simulation, load_system
from waveos.ipu_emulator.serving.workload import Ask, Workload, bundled_trace, make_workload, read_mooncake
from waveos.output import write_file
from waveos.report.perfetto import write_drawn
from waveos.report.serving import render_report
from waveos.serving import Recovery, Tier
from waveos.serving.engine import Transfer

OPTIONS = {
    "out": ("", "HTML file to draw it all into"),
    "trace": ("", "file for a timeline of a run through Strata's policies (ui.perfetto.dev); .gz is compressed"),
    "model": ("llama-3.1-8b", "a model of the data files, or a TOML file"),
    "workload": ("loogle", "loogle, narrativeqa, reviewmt or sharegpt"),
    "gpu": ("h200", "h100, h200, b200, gh200, or a TOML file"),
    "queries": (600, "requests of each run"),
    "systems": ("strata,strata-io,sglang-hicache,vllm-lmcache,trt-hicache", "serving systems, comma-separated"),
    "seed": (1, "seed of arrivals, order and lengths"),
}
S = 1e9
LOADS = (0.3, 0.5, 0.7, 0.85, 1.0, 1.15)
"""Offered, as shares of what the system can do at most."""
FAILS_S, STEP_S, AFTER_S, GAP_S = 20.0, 0.05, 12.0, 0.5
PROMPT, OUTPUTS = 4_000, 400


def run(
    out: str = "",
    trace: str = "",
    model: str = "llama-3.1-8b",
    workload: str = "loogle",
    gpu: str = "h200",
    queries: int = 600,
    systems: str = "strata,strata-io,sglang-hicache,vllm-lmcache,trt-hicache",
    seed: int = 1,
) -> dict[str, Any]:
    """The figures, and the page and the timeline that were asked for."""
    if queries < 20:
        raise ConfigError(f"queries {queries}: at least 20")
    for path in (out, trace):
        if path and not Path(path).resolve().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {Path(path).resolve().parent}; make it first")
    constants = load_constants()

    def setup(name: str, **more: Any) -> Setup:
        return Setup(load_system(name), gpu, model, 1, in_flight=constants.given.in_flight, **more)

    def load(rate: float) -> Workload:
        return make_workload(workload, rate, constants.fitted, queries=queries, seed=seed)

    curves, hits, costs = {}, {}, {}
    for name in systems.split(","):
        peak = Simulation(setup(name), load(1e3)).run()
        most = peak.requests / peak.duration_s
        runs = [Simulation(setup(name), load(most * share)).run() for share in LOADS]
        curves[name] = [{"requests_per_s": each.requests / each.duration_s, "throughput": each.throughput, **_ttft(each)} for each in runs]
        hits[name] = by_tier(peak)
        costs[name] = {"link_us": peak.link_us_per_iteration, "freed_us": peak.policy_us_per_iteration}
    small = setup("strata", host_bytes=constants.given.host_bytes / 40, storage_bytes=constants.given.host_bytes)
    stored = Simulation(small, load(most * 0.5))
    fetched = _watch_fetches(stored)
    hits["strata, small host memory, storage"] = by_tier(stored.run(), sum(fetched))
    timeline = Timeline(Simulation(setup("strata"), load(most * 0.7)))
    timeline.simulation.run()
    if trace:
        write_drawn(timeline.events(), trace, {"timing": "modelled", "system": "strata", "model": model, "workload": workload})
    results = {
        "name": f"serving: {model} on {gpu}, {workload}",
        "subsystem": "serving",
        "timing": "modelled",
        "curves": curves,
        "hits": hits,
        "costs": costs,
        "timeline": timeline.spans(60.0),
        "balance": balance(),
        "recovery": {kind.name.lower(): recovery(kind) for kind in Recovery},
    }
    if out:
        write_file(out, render_report(results))
    metrics = {}
    for name, points in curves.items():
        key = name.replace("-", "_")
        metrics[f"{key}_peak_tokens_per_s"] = max(each["throughput"] for each in points)
        metrics[f"{key}_ttft_s_at_half_load"] = points[1]["ttft_s"]
        metrics[f"{key}_link_us_per_iteration"] = costs[name]["link_us"]
        metrics[f"{key}_host_us_freed_per_iteration"] = costs[name]["freed_us"]
    metrics = {name: round(value, 3) for name, value in metrics.items()}
    told = ", ".join(f"{what}: {path}" for what, path in (("report", out), ("timeline", trace)) if path)
    return {"name": "serving_report", "metrics": metrics, "machine": describe_machine(), "timing": "modelled", "verdict": told or "nothing was drawn"}


def _ttft(result: Result) -> dict[str, float]:
    return {"ttft_s": float(result.ttft_s.mean()), "ttft_p99_s": float(np.quantile(result.ttft_s, 0.99))}


def _watch_fetches(simulation: Simulation) -> list[int]:
    """Tokens of each prefetch from storage, as they arrive."""
    fetched: list[int] = []
    done = simulation.mechanism.transfer_done

    def arrived(transfer: Transfer) -> None:
        if transfer.source is Tier.STORAGE:
            fetched.append(transfer.tokens)
        done(transfer)

    simulation.mechanism.transfer_done = arrived  # type: ignore[method-assign]
    return fetched


def by_tier(result: Result, fetched: int = 0) -> dict[str, float]:
    """Where the tokens of the prompts came from, as shares; what was fetched from storage went by way of host memory."""
    host = sum(each.loaded for each in result.batches)
    total, stored = max(1, result.prompt_tokens), min(fetched, host)
    shares = {"device": (result.hit_tokens - host) / total, "host": (host - stored) / total, "storage": stored / total}
    return {**shares, "computed": 1.0 - result.hit_tokens / total}


class Timeline:
    """A simulation whose wires and iterations are written down: (track, begin, end, name, facts), in ns."""

    TRACKS = ("prefill", "stall", "decode", "load", "back up", "storage", "agent")

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.rows: list[tuple[int, str, int, int, str, dict[str, Any]]] = []
        self._decoding: dict[int, tuple[int, int]] = {}
        for executor in simulation.node.executors:
            for track, wire in (("load", executor.load), ("back up", executor.back_up), ("storage", executor.storage)):
                self._watch_wire(executor.number, track, wire)
        self._watch_decode()
        self._watch_agent()

    def _watch_wire(self, number: int, track: str, wire: Any) -> None:
        take = wire.take

        def taken(now_ns: int, lasts_ns: int, tokens: int) -> tuple[int, int]:
            span: tuple[int, int] = take(now_ns, lasts_ns, tokens)
            self.rows.append((number, track, *span, f"{tokens:,} tokens", {"tokens": tokens, "waited_us": (span[0] - now_ns) / 1e3}))
            return span

        wire.take = taken

    def _watch_decode(self) -> None:
        node = self.simulation.node
        decoded = node._decoded

        def watched(executor: Any, ticket: int) -> None:
            if ticket == executor.ticket and not executor.paused:
                name = f"{executor.steps} x {executor.decoding}"
                facts = {"iterations": executor.steps, "requests": executor.decoding, "kv_tokens": executor.kv_tokens}
                self.rows.append((executor.number, "decode", executor.begin_ns, node.clock.now_ns, name, facts))
            decoded(executor, ticket)

        node._decoded = watched  # type: ignore[method-assign]

    def _watch_agent(self) -> None:
        simulation = self.simulation
        answered, pump = simulation._answered, simulation._pump
        seen = [0]

        def pumped() -> None:
            was = simulation._pumping
            pump()
            if simulation._pumping and not was:
                seen[0] = simulation.clock.now_ns

        def done(decisions: Any) -> None:
            self.rows.append((0, "agent", seen[0], simulation.clock.now_ns, f"{len(decisions)} decisions", {"decisions": len(decisions)}))
            answered(decisions)

        simulation._pump, simulation._answered = pumped, done  # type: ignore[method-assign]

    def _all(self) -> list[tuple[int, str, int, int, str, dict[str, Any]]]:
        rows = list(self.rows)
        for executor in self.simulation.node.executors:
            for each in executor.batches:
                facts = {"requests": each.requests, "computed": each.computed, "loaded": each.loaded, "stall_us": each.stall_ns / 1e3}
                name = f"{each.requests} requests, {each.computed:,} new, {each.loaded:,} loaded"
                rows.append((executor.number, "prefill", each.begin_ns, each.end_ns, name, facts))
                if each.stall_ns:
                    rows.append((executor.number, "stall", each.begin_ns, each.begin_ns + each.stall_ns, "waits for KV", {}))
        return sorted(rows, key=lambda row: row[2])

    def events(self) -> list[dict[str, Any]]:
        """Trace-event objects: a process an instance, a track each thing that it does one at a time."""
        named = []
        for executor in self.simulation.node.executors:
            pid = executor.number + 1
            named.append({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 0, "args": {"name": f"instance {executor.number}"}})
            for tid, track in enumerate(self.TRACKS, 1):
                named.append({"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "ts": 0, "args": {"name": track}})
        return named + [
            {
                "ph": "X",
                "pid": number + 1,
                "tid": self.TRACKS.index(track) + 1,
                "ts": begin / 1e3,
                "dur": (end - begin) / 1e3,
                "name": name,
                "cat": track,
                "args": facts,
            }
            for number, track, begin, end, name, facts in self._all()
        ]

    def spans(self, seconds: float) -> dict[str, list[tuple[float, float]]]:
        """(begin, duration) in s by track, of the middle of the run."""
        rows = [row for row in self._all() if row[0] == 0]
        if not rows:
            return {}
        begin = max(0.0, rows[len(rows) // 2][2] / S - seconds / 20)
        end = begin + seconds / 10
        return {
            track: [(each[2] / S, (each[3] - each[2]) / S) for each in rows if each[1] == track and each[3] / S > begin and each[2] / S < end]
            for track in self.TRACKS
        }


def balance() -> dict[str, dict[str, list[float]]]:
    """Llama-3.1-70B on 5 to 7 ranks: each rank's share of KV memory and of attention, over the even share; by ordinary sharding and by FailSafe's homes."""
    told = {}
    for ranks in (5, 6, 7):
        simulation = Simulation(failsafe_setup("llama-3.1-70b", "h100", ranks, "failsafe", most_replicated=1.0), read_mooncake(bundled_trace(), 80))
        executor, sums = simulation.node.executors[0], np.zeros(ranks)
        while simulation.step():
            if executor.kv_tokens and len(executor.homes) == ranks:
                sums += [base + count * executor.iteration for base, count in zip(executor.homes, executor.home_counts, strict=True)]
        sharding = executor.costs.sharding
        static = [sharding.heads // ranks + (rank < sharding.heads % ranks) for rank in range(ranks)]
        shares = sums / sums.sum() if sums.sum() else np.full(ranks, 1 / ranks)
        homes = (sharding.spread + sharding.extra * shares) / sharding.heads * ranks
        told[f"TP{ranks}"] = {"uneven": [each / sharding.heads * ranks for each in static], "failsafe": homes.tolist()}
    return told


def recovery(kind: Recovery) -> list[tuple[float, float]]:
    """(s since the failure, tokens decoded since a second before) of a node of eight that loses a GPU."""
    count = round((FAILS_S + AFTER_S) / GAP_S)
    evenly = Workload("evenly", [Ask(round(number * GAP_S * S), PROMPT, OUTPUTS, [number + 1], [PROMPT]) for number in range(count)])
    params: dict[str, Any] = {"write_threshold": 1e9} if kind is Recovery.RECOMPUTE else {}
    simulation = Simulation(failsafe_setup("llama-3.1-70b", "h100", 8, "failsafe", recovery=float(kind), **params), evenly)
    simulation.clock.at(round(FAILS_S * S), simulation.node.fail, 0, 7)
    executor, node = simulation.node.executors[0], simulation.node
    points: list[tuple[float, float]] = []

    def tokens() -> float:
        running = executor.steps and not executor.paused and executor.begin_ns < simulation.clock.now_ns
        steps = node._steps_by(executor, simulation.clock.now_ns + 1) - 1 if running else 0
        return executor.decoded + steps * executor.decoding

    def sample(first: float) -> None:
        points.append((simulation.clock.now_ns / S - FAILS_S, tokens() - first))
        if simulation.clock.now_ns / S < FAILS_S + AFTER_S:
            simulation.clock.at(simulation.clock.now_ns + round(STEP_S * S), sample, first)

    simulation.clock.at(round((FAILS_S - 1.0) * S), lambda: sample(tokens()))
    while simulation.clock.now_ns / S < FAILS_S + AFTER_S and simulation.step():
        pass
    return points
