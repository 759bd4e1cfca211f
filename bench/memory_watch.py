"""What is seen of a live run from outside: the database's own lines, memory in use, CPU time of the daemons, and, if wanted, every batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from waveos.bench.memory_database import PARTS
from waveos.errors import MissingError
from waveos.host.memory.procfs import Process

BINS = 64
"""Of the address space in maps."""
EVERY_S = 1.8
"""Between two looks at all batches."""
TICKS = os.sysconf("SC_CLK_TCK")


class Watch:
    """One run. `daemons` are the pids whose CPU time is kept, by name."""

    def __init__(
        self, pid: int, cgroup: Path, zram: Any, places: dict[str, list[list[int]]], scrambled: bool, hot_share: float, move_s: float
    ) -> None:
        """places: which batches each part of the keys lies in, by address of a run of mappings; {}: batches are not looked at."""
        self.process, self.cgroup, self.zram = Process(pid), cgroup, zram
        self.rows: list[dict[str, Any]] = []
        self.daemons: dict[str, int] = {}
        self._cpu_s: dict[str, float] = {}
        self._starts = {int(start, 16): [np.array(part, int) for part in parts] for start, parts in places.items()}
        self._scrambled, self._hot_share, self._move_s = scrambled, hot_share, move_s
        self._looked_s = -EVERY_S

    def follow(self, lines: Any, for_s: float) -> list[dict[str, Any]]:
        """What the database tells for so long (0: its next line), with the rest beside. Raises MissingError when it ends."""
        begin = len(self.rows)
        for line in lines:
            row = json.loads(line)
            last_s = self.rows[-1]["s"] if self.rows else row["s"] - 1
            row["wall_s"] = row["s"] - last_s
            row["zram_kib"] = self.zram.used_bytes() >> 10
            row["usage_kib"] = int((self.cgroup / "memory.usage_in_bytes").read_text()) >> 10
            for name in ("hostd", "agent"):
                now = _cpu_s(self.daemons[name]) if name in self.daemons else 0.0
                row[f"{name}_s"] = now - self._cpu_s.get(name, now)
                self._cpu_s[name] = now
            if self._starts and row["s"] - self._looked_s >= EVERY_S:
                self._looked_s = row["s"]
                self._look(row)
            self.rows.append(row)
            if row["s"] - self.rows[begin]["s"] >= for_s - 1:
                return self.rows[begin:]
        raise MissingError(f"the database (pid {self.process.pid}) ended early")

    def _look(self, row: dict[str, Any]) -> None:
        """Which batches are resident, and which are hot in truth: those that some part of the keys that is hot now lies in."""
        mappings = self.process.mappings()
        hot_parts = self._hot_parts(row["s"])
        resident, hot = [], []
        for start, parts in self._starts.items():
            first = int(np.searchsorted(mappings.start, start))
            count = 1 + max(int(part.max(initial=-1)) for part in parts)
            resident.append(mappings.rss[first : first + count] / np.maximum(1, (mappings.end - mappings.start)[first : first + count] >> 10))
            of_region, holds = np.zeros(count, bool), np.zeros(count, bool)
            for number, part in enumerate(parts):
                holds[part] = True
                of_region[part] |= number in hot_parts
            hot.append(np.where(holds, of_region, True))  # what holds no keys is the database's own: none of it is ever known to be cold
        row["resident"], row["hot"] = np.concatenate(resident), np.concatenate(hot)

    def _hot_parts(self, at_s: float) -> set[int]:
        if self._scrambled:
            return set(range(PARTS))
        first = int(at_s // self._move_s) * self._hot_share * PARTS
        return {int(first + k) % PARTS for k in range(int(self._hot_share * PARTS))}

    def figures(self, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, float]:
        """Of the time that counts, against the time before there was a policy."""

        def rate(rows: list[dict[str, Any]], clock: str) -> float:
            return float(sum(row["gets"] for row in rows) / sum(row[clock] for row in rows))

        def mean(rows: list[dict[str, Any]], name: str) -> float:
            return fmean(row[name] for row in rows)

        full_kib = max(row["rss_kib"] for row in before)
        zram_kib, span_s = mean(after, "zram_kib"), sum(row["wall_s"] for row in after)
        told = {
            "saved_share": 1 - (mean(after, "rss_kib") + zram_kib) / full_kib,
            "saved_usage_share": 1 - (mean(after, "usage_kib") + zram_kib) / max(row["usage_kib"] for row in before),
            "throughput_ratio": rate(after, "cpu_s") / rate(before, "cpu_s"),
            "wall_throughput_ratio": rate(after, "wall_s") / rate(before, "wall_s"),
            "get_p99_ratio": mean(after, "p99_us") / mean(before, "p99_us"),
            "get_p99_us": mean(after, "p99_us"),
            "gets_per_s": rate(after, "wall_s"),
            "hostd_cores": sum(row["hostd_s"] for row in after) / span_s,
            "agent_cores": sum(row["agent_s"] for row in after) / span_s,
        }
        seen = [_belief(row) for row in after if "hot" in row]
        if seen:
            told |= {"precision": fmean(precision for precision, _ in seen), "recall": fmean(recall for _, recall in seen)}
        return told

    def series(self) -> dict[str, list[float]]:
        """One value a line of the database; what is looked at less often stands as it was last seen."""
        rows = self.rows
        told: dict[str, list[float]] = {
            "time_s": [row["s"] for row in rows],
            "resident_mib": [row["rss_kib"] / 1024 for row in rows],
            "zram_mib": [row["zram_kib"] / 1024 for row in rows],
            "kgets_per_cpu_s": [row["gets"] / row["cpu_s"] / 1e3 for row in rows],
            "get_p50_us": [row["p50_us"] for row in rows],
            "get_p99_us": [row["p99_us"] for row in rows],
            "hostd_cores": [row["hostd_s"] / row["wall_s"] for row in rows],
            "agent_cores": [row["agent_s"] / row["wall_s"] for row in rows],
        }
        if self._starts:
            last = (0.0, 0.0)
            told["precision"], told["recall"] = [], []
            for row in rows:
                last = _belief(row) if "hot" in row else last
                told["precision"].append(last[0])
                told["recall"].append(last[1])
        return {name: [round(float(value), 4) for value in values] for name, values in told.items()}

    def maps(self) -> dict[str, Any]:
        """[looks, BINS] what was hot in truth, and what was resident, over address and time; {} if batches were not looked at."""
        looks = [row for row in self.rows if "hot" in row]

        def binned(name: str) -> list[list[float]]:
            return [[float(f"{part.mean():.3g}") for part in np.array_split(row[name], BINS)] for row in looks]

        return {"hot": binned("hot"), "resident": binned("resident")} if looks else {}


def _belief(row: dict[str, Any]) -> tuple[float, float]:
    """(precision, recall) of "cold": what was reclaimed and is cold, as a share of what was reclaimed, and of what is cold."""
    reclaimed, cold = row["resident"] < 0.5, ~row["hot"]
    right = float((reclaimed & cold).sum())
    return right / max(1.0, float(reclaimed.sum())), right / max(1.0, float(cold.sum()))


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
