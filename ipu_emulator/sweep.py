"""A point of a sweep: one scenario, run whole in one process, and what came out as flat rows.

Points know nothing of each other, so a sweep is as wide as the machine, or the cluster, has cores. Within a point runs follow one another: a scenario of
`sched` is searched for its saturation, or run at its loads, in slices under the pool's watchdog; one of another subsystem is compared by its own model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any

from waveos.errors import WaveError
from waveos.ipu_emulator.experiment import Comparison, check_policies
from waveos.ipu_emulator.inputs import Inputs
from waveos.ipu_emulator.job import Inside, OpenJob

FACTORY = "waveos.ipu_emulator.sweep:open_point"
"""What a pool makes of a `PointJob`."""
_ROOMS = ("waveos", "waveos.agents", "waveos.ipu_emulator")
_SHORTENED = ("figures.", "classes.")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class PointJob:
    """One point. `placement`: a place, or "all"; `saturation`: search for it instead of running the scenario's loads (`sched` only)."""

    label: str  # as "host.workers=4, agent.speed=0.5", for errors
    scenario: Any
    inputs: Inputs | None  # of `sched`; others read their own
    placement: str
    saturation: bool = False

    @property
    def policy(self) -> str:
        """What to name when it does not return."""
        return f"{', '.join(self.scenario.policies.names)} at {self.label}"

    @property
    def subsystem(self) -> str:
        """Whose messages its policies handle."""
        return "sched" if self.scenario.subsystem == "vm" else str(self.scenario.subsystem)


class OpenPoint:
    """A point as a pool's child runs it: `advance` in slices, then `result`."""

    def __init__(self, job: PointJob, handling: int) -> None:
        self._job = job
        self._steps = (_search if job.scenario.subsystem == "sched" else _compare)(job, handling)
        self._rows: Rows = []

    def advance(self, wall_ns: int) -> bool:
        """Go on for one slice; True when the point is done."""
        try:
            next(self._steps)
        except StopIteration as end:
            self._rows = end.value
            return True
        except WaveError as error:
            raise type(error)(f"at {self._job.label}: {error}") from error
        return False

    def result(self) -> Rows:
        """What came out."""
        return self._rows


def open_point(job: PointJob, handling: int) -> OpenPoint:
    """The point, ready to advance. `handling`: address of the word that tells which message the policy is at; 0: none."""
    return OpenPoint(job, handling)


def rows_of(results: Mapping[str, Any]) -> Rows:
    """A comparison's results as rows of plain values: one a configuration, or one for each of its loads where it was run at several.

    Tables within are columns with dotted names (`GET.p99_us`); lists (series, maps, the steps of a search) and what is not known are left out.
    """
    rows: Rows = []
    for config in results["configs"]:
        points = config.get("points") if config.get("saturation_per_s") is None else None
        rows += [dict(_plain(config)) | dict(_plain(point)) for point in points or [{}]]
    return rows


@cache
def code_hash() -> str:
    """A hash of everything that a model's answer depends on: the sources of the models, the policies and the contract."""
    digest = hashlib.sha256()
    for room in _ROOMS:
        for path in sorted((each for each in _sources(files(room))), key=str):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _search(job: PointJob, handling: int) -> Generator[None, None, Rows]:
    assert job.inputs is not None
    comparison = Comparison(check_policies(job.scenario), job.inputs, link={}, only=lambda each: job.placement in ("all", each.world))
    searches = comparison.searches(saturation=job.saturation, scan_loads=not job.saturation)
    yield from comparison.steps(searches, lambda run: OpenJob(run, handling))
    return rows_of(comparison.results())


def _compare(job: PointJob, handling: int) -> Generator[None, None, Rows]:
    experiment = import_module(f"waveos.ipu_emulator.{job.scenario.subsystem}.experiment")
    yield
    places = experiment.PLACEMENTS if job.placement == "all" else (job.placement,)
    return rows_of(experiment.compare(job.scenario, places, pool=Inside(handling)))


def _plain(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _plain(value, f"{name}.")
        elif hasattr(value, "item"):
            yield _short(name), value.item()
        elif isinstance(value, bool | int | float | str):
            yield _short(name), value


def _short(name: str) -> str:
    for prefix in _SHORTENED:
        name = name.removeprefix(prefix)
    return name


def _sources(folder: Any) -> Iterator[Any]:
    for each in folder.iterdir():
        if each.is_dir() and each.name not in ("cli", "report", "__pycache__", "host", "bench"):
            yield from _sources(each)
        elif each.name.endswith((".py", ".toml")):
            yield each
