"""The Wave paper's headline figures, beside what this software obtains, how, and how far each moves when what is assumed is halved and doubled.

`X` is a figure with the data as it is; `X_low` and `X_high` are the least and the most of it over all variations of what its models assume (`paper.toml`
lists them); `X_published` is the paper's. Nothing is tuned: the data lay in the repository before the first run.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from waveos.bench import paper_figures as figures
from waveos.bench.machine import describe_machine
from waveos.bench.paper_figures import Effort
from waveos.bench.paper_variation import Variation, variations
from waveos.cli.terminal import talk
from waveos.errors import WaveError

OPTIONS = {
    "seed": (1, "seed of all runs"),
    "quick": (False, "assumptions halved and doubled only all at once, not one at a time: some ten minutes"),
    "processes": (0, "processes that simulate; 0: one a core"),
    "markdown": ("", "write the table to this file"),
    "page": ("", "write the table, with every variation, to this HTML file"),
}
AS_IT_IS = Variation()
VM_GAINS = ("vm_gain_max", "vm_gain_from_ticks", "vm_gain_from_sleep", "vm_gain_from_turbo")


class Figure(NamedTuple):
    """One figure: what it is called in the metrics, how it is obtained, and from what, if anything of that is assumed."""

    name: str
    how: str
    subsystem: str
    workload: Mapping[str, Any]
    evaluate: Callable[[Mapping[str, Any], Variation, Effort], float | dict[str, float]]  # by name, where one run gives several


def figures_of(data: Mapping[str, Any]) -> list[Figure]:
    """All that are evaluated; the cost of offloading is one a workload."""
    by_name = {each["name"]: each for each in data["workloads"]}
    costs = [
        Figure(
            f"offload_cost_{each['name']}",
            f"modelled: {each['policy']} in scenario {each['scenario']}",
            each["subsystem"],
            each,
            figures.offload_cost,
        )
        for each in data["workloads"]
    ]
    return [
        *costs,
        Figure(
            "unmitigated_slowdown", "modelled: an unloaded decision of shinjuku_mq", "sched", by_name["shinjuku_mq"], figures.unmitigated_slowdown
        ),
        Figure(
            "memory_cores_saved",
            "modelled, the policy's CPU time measured: SOL over 256 GiB in batches of 256 KiB",
            "memory",
            by_name["memory"],
            figures.memory_cores_saved,
        ),
        *(
            Figure(
                name,
                "modelled: ticks of the host off, all of it offloaded, over the shares of busy machines of scenario vm",
                "vm",
                by_name["vm"],
                figures.vm_gains,
            )
            for name in VM_GAINS
        ),
        Figure("rpc_cores_saved", "modelled, the stack's time measured: data/net/rpc.toml", "net", by_name["rpc"], figures.rpc_cores_saved),
    ]


def run(seed: int = 1, quick: bool = False, processes: int = 0, markdown: str = "", page: str = "") -> dict[str, Any]:
    """The bench's object; besides, `rows` of the table and `variations` by figure."""
    data = tomllib.loads(Path(__file__).with_name("paper.toml").read_text())
    effort = Effort(seed=seed)
    wanted = figures_of(data)
    values = evaluate(wanted, data, effort, quick, processes or len(os.sched_getaffinity(0)))
    rows = [
        *_offload_rows(wanted, values, data),
        *(_row(each, values[each.name], data) for each in wanted if each.evaluate is not figures.offload_cost),
    ]
    metrics: dict[str, float] = {}
    for row in rows:
        metrics |= {row["name"] + suffix: row[key] for suffix, key in _SUFFIXES.items() if row[key] is not None}
    result = {
        "name": "paper",
        "metrics": metrics,
        "machine": describe_machine(),
        "timing": "modelled",
        "quick": quick,
        "verdict": "; ".join(_judge(row) for row in rows if row["published"] is not None),
        "source": data["source"],
        "rows": rows,
        "variations": {name: {each.name: value for each, value in of.items()} for name, of in values.items()},
    }
    if markdown or page:
        from waveos.bench import paper_page

        paper_page.write(result, markdown, page)
    return result


_SUFFIXES = {"": "value", "_low": "low", "_high": "high", "_published": "published"}


def evaluate(
    wanted: Sequence[Figure], data: Mapping[str, Any], effort: Effort, quick: bool, processes: int
) -> dict[str, dict[Variation, float | None]]:
    """Each figure under each variation of what its subsystem assumes; None where that leaves no answer. Ctrl-C ends it, and nothing is kept."""
    tasks: dict[tuple[Any, str, Variation], list[Figure]] = {}  # one run may give several figures
    for figure in wanted:
        if figure.subsystem == "vm":
            changed = figures.vm_variations()
        else:
            changed = variations(data["assumed"][figure.subsystem], data["left_out"])
        for each in (AS_IT_IS, *(changed[-2:] if quick else changed)):
            tasks.setdefault((figure.evaluate, figure.workload["name"], each), []).append(figure)
    values: dict[str, dict[Variation, float | None]] = {figure.name: {} for figure in wanted}
    longest_first = sorted(tasks.items(), key=lambda task: task[1][0].subsystem != "memory")
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(_evaluate, key[0], of[0].workload, key[2], effort): (key[2], of) for key, of in longest_first}
        begun = last = time.monotonic()
        try:
            for done, future in enumerate(as_completed(running), 1):
                variation, of = running[future]
                found = future.result()
                for figure in of:
                    values[figure.name][variation] = found[figure.name] if isinstance(found, dict) else found
                now = time.monotonic()
                if now - last > 5.0 or done == len(tasks):
                    last = now
                    left_s = (now - begun) / done * (len(tasks) - done)
                    talk(f"{done} of {len(tasks)} runs done, about {left_s:.0f} s left; last: {of[0].name}, {variation.name}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return values


def _evaluate(function: Callable[..., Any], workload: Mapping[str, Any], variation: Variation, effort: Effort) -> Any:
    """In a process of its own."""
    try:
        return function(workload, variation, effort)
    except WaveError:
        if variation == AS_IT_IS:
            raise
        return None  # as where a service is asked for more than its workers can do


def _offload_rows(wanted: Sequence[Figure], values: Mapping[str, Any], data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The least and the most over the workloads, then each workload."""
    costs = [each for each in wanted if each.evaluate is figures.offload_cost]
    rows = [_row(each, values[each.name], data) for each in costs]
    ends = []
    for name, pick in (("offload_cost_min", min), ("offload_cost_max", max)):
        at = pick(rows, key=lambda row: row["value"])
        ends.append(
            {
                **_row(
                    Figure(name, f"over {len(rows)} workloads; here {at['name'].removeprefix('offload_cost_')}", "", {}, figures.offload_cost),
                    {},
                    data,
                ),
                "value": at["value"],
                "low": pick(row["low"] for row in rows),
                "high": pick(row["high"] for row in rows),
            }
        )
    return ends + rows


def _row(figure: Figure, values: Mapping[Variation, float | None], data: Mapping[str, Any]) -> dict[str, Any]:
    told = data["published"].get(figure.name, {})
    found = [value for value in values.values() if value is not None]
    base = values.get(AS_IT_IS) or 0.0
    widest = max(values, key=lambda each: abs((values[each] or base) - base), default=AS_IT_IS)
    return {
        "name": figure.name,
        "value": values.get(AS_IT_IS),
        "low": min(found, default=None),
        "high": max(found, default=None),
        "published": told.get("value"),
        "published_source": told.get("source", ""),
        "how": figure.how,
        "moves_most": "" if widest == AS_IT_IS else widest.name,
        "unanswered": [each.name for each, value in values.items() if value is None],
    }


def _judge(row: Mapping[str, Any]) -> str:
    where = "inside" if row["low"] <= row["published"] <= row["high"] else "outside"
    return f"{row['name']} {row['value']:.3g} ({row['low']:.3g}..{row['high']:.3g}), published {row['published']:g}: {where} the range"
