"""The demo: a real RocksDB measured on this machine, and what it costs and saves to move the scheduling of its requests to an IPU.

Four steps, each with something to read: service times (measured), what the policies cost a message (measured), the comparison (modelled), and the same
service under a live agent on this kernel (measured, with the model's prediction beside it; root only). It leaves `demo.json`, `live.json`, `report.html`
and `trace.json.gz` in a folder, `out/` by default.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from waveos.bench import live, live_demo
from waveos.bench.machine import describe_machine
from waveos.bench.policy import message_costs
from waveos.cli.results import give_results
from waveos.cli.running import measure, open_pool, prepare, single_run, write_trace
from waveos.cli.terminal import print_table, stdout, talk
from waveos.host import rocksdb
from waveos.output import make_folder
from waveos.report.table import comparison_table
from waveos.scenario import Scenario, load_scenario

SCENARIO = "rocksdb"
QUICK = ("run.duration_ms=100", "run.warmup_ms=20", "run.replications=3", "run.resolution_share=0.04", "workload.loads_share=[0.3, 0.6, 0.8]")
FIRST_LOAD_SHARE = 0.5
TRACE_MS = 5.0


def main(arguments: list[str]) -> int | None:
    """Run the demo with these flags; returns an exit code, None for success."""
    parser = argparse.ArgumentParser(
        prog="wave demo", description="Measure a real RocksDB here, then see what moving its scheduling to an IPU costs and saves."
    )
    parser.add_argument("--quick", action="store_true", help="fewer load points and shorter runs; for a look, not for figures")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for results, report and trace (default: out)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="override a key of the scenario")
    options = parser.parse_args(arguments)
    scenario = load_scenario(SCENARIO, [*(QUICK if options.quick else ()), *options.settings])
    folder = make_folder(options.out)

    _show_service_times(scenario)
    _show_costs(scenario)
    with open_pool(None) as pool:
        code = _show_first(scenario, pool)
        if code is not None:
            return code
        talk("3. the whole sweep: every policy in every place, saturation throughput, and the link's mitigations taken away one by one (modelled)")
        comparison = prepare(scenario, pool)
        code = measure(comparison, pool, saturation=True, ablation=True)
        trace = folder / "trace.json.gz"
        if code is None:
            write_trace(single_run(scenario, "offload", pool), pool, scenario.run.warmup_ms, TRACE_MS, trace)
    give_results(comparison.results(), folder / "demo.json", folder / "report.html", False, stopped=code)
    if code is None:
        talk(f"trace of {TRACE_MS:g} ms: {trace} (open it at https://ui.perfetto.dev)")
        _show_live(folder / "live.json", options.quick)
    return code


def _show_live(path: Path, quick: bool) -> None:
    """Real threads on this kernel, where that may be."""
    if reason := live.why_not():
        talk(f"4. live on this kernel: left out, because it {reason}")
        return
    talk(
        "4. live on this kernel: RocksDB workers on the first CPU, agent and client on the second; the kernel's default, then two policies by the agent"
    )
    result = live_demo.run(*((1.0, 1) if quick else (3.0, 3)))
    quanta = ", ".join(f"quantum of {policy} {value:g} µs" for policy, value in result["quanta_us"].items())
    result["rows"] = [asdict(row) for row in result["rows"]]
    print_table(
        ("scheduler", "timing", "requests/s", "GET p50 µs", "GET p99 µs", "RANGE p50 µs", "RANGE p99 µs"),
        [(row["scheduler"], row["timing"], *(f"{row['figures'][key]:,.0f}" for key in live_demo.KEYS)) for row in result["rows"]],
        title=f"at {result['rate_per_s']:,.0f} requests/s, 0.5 % of them RANGEs; {quanta}",
        numbers=("requests/s", "GET p50 µs", "GET p99 µs", "RANGE p50 µs", "RANGE p99 µs"),
    )
    path.write_text(json.dumps({"name": "live_demo", "machine": describe_machine(), **result}, indent=1))
    if result["noisy_share"]:
        talk(f"   other programs took more than 5 % of the workers' CPU in {result['noisy_share']:.0%} of the windows: for a look, not for figures")
    talk(f"   {path}; with peers, saturation and the cost of each step: sudo wave bench live (docs/live.md)")


def _show_service_times(scenario: Scenario) -> None:
    talk("1. a real RocksDB on this machine: 1,000,000 entries, GET of one and RANGE over 5,000 (measured)")
    told: list[str] = []

    def tell(stage: str, done: int, total: int) -> None:
        if stage not in told:
            told.append(stage)
            talk(f"   {stage} ...")

    times = rocksdb.measure_once(progress=tell)
    rows = []
    for name, values in (("GET", times.get_ns), ("RANGE", times.range_ns)):
        p50, p99 = (float(v) / 1_000 for v in _quantiles(values))
        rows.append((name, f"{len(values):,}", f"{values.mean() / 1_000:,.1f}", f"{p50:,.1f}", f"{p99:,.1f}"))
    print_table(
        ("request", "samples", "mean µs", "p50 µs", "p99 µs"),
        rows,
        title="service times, measured",
        numbers=("samples", "mean µs", "p50 µs", "p99 µs"),
    )


def _quantiles(values: Any) -> Any:
    import numpy as np

    return np.quantile(values, (0.5, 0.99))


def _show_costs(scenario: Scenario) -> None:
    talk(f"2. what a policy costs for a message on one core of this machine, {describe_machine()['cpu']} (measured)")
    costs = message_costs(scenario.policies.names, scenario.policies.params)
    print_table(("policy", "ns a message"), [(name, f"{cost:.0f}") for name, cost in costs.items()], numbers=("ns a message",))


def _show_first(scenario: Scenario, pool: Any) -> int | None:
    """One load point in all configurations, so that there is something to look at while the sweep runs."""
    comparison = prepare(scenario, pool)
    comparison.grid = [min(comparison.grid, key=lambda load: abs(load - FIRST_LOAD_SHARE * max(comparison.grid)))]
    code = measure(comparison, pool, saturation=False)
    if code is None:
        stdout().print(comparison_table(comparison.results()))
    return code
