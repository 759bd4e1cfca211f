"""What a plan asks and answers, on a machine whose answers are known."""

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from waveos.errors import ConfigError
from waveos.ipu_emulator.inputs import Inputs
from waveos.ipu_emulator.job import setup_of
from waveos.ipu_emulator.plan import LATENCIES_NS, SPEED_LEAST, SPEED_MOST, SPEEDS, Plan, highest
from waveos.ipu_emulator.profile import load_link
from waveos.report import plan as report
from waveos.scenario import check_scenario


def scenario(**changes):
    raw = {
        "name": "test",
        "host": {"workers": 8},
        "agent": {"message_ns": 40},
        "workload": {"loads_per_s": [100_000], "classes": [{"name": "GET", "service": {"fixed_us": 10}, "slo_us": 200}]},
        "policies": {"names": ["fifo"]},
        "run": {"replications": 3},
        "objective": {"GET": {"p99_us": 200}},
    }
    return check_scenario(raw | changes)


@dataclass
class Machine:
    """A pool whose runs meet the objective up to a load that is known: what the workers serve, or the agent, whichever is less."""

    worker_per_s: float = 90_000
    agent_per_s: float = 2_000_000  # of an agent at the host's speed
    link_tax: float = 1.0  # of a worker's throughput lost for each us of one way
    kernel_per_s: float = 100_000
    asked: list = field(default_factory=list)

    def __post_init__(self):
        self.queue = []

    def limit(self, setup):
        if setup.placement == "kernel":
            return self.kernel_per_s
        workers = self.worker_per_s * setup.workers
        if setup.placement == "on-host":
            return min(workers, self.agent_per_s)
        speed = setup.link.relative_speed if setup.speed is None else setup.speed
        return min(workers * (1 - self.link_tax * setup.link.wire.one_way_ns / 10_000), self.agent_per_s * speed)

    def submit(self, job):
        self.queue.append((len(self.asked), job))
        self.asked.append(job.ask)
        return self.queue[-1][0]

    def finished(self):
        while self.queue:
            number, job = self.queue.pop()
            yield number, (self.point(job), None)

    def point(self, job):
        setup = setup_of(job)
        p99_us = 200 * setup.load_per_s / self.limit(setup)
        latency = 10 + setup.link.wire.one_way_ns / 1000 if setup.placement == "offload" else 10.0
        classes = {"GET": {"count": 1000, "p50_us": latency, "p99_us": p99_us, "p999_us": 300.0, "mean_us": 20.0}}
        return {
            "load_per_s": setup.load_per_s,
            "saturated": False,
            "classes": classes,
            "ready_to_running_p50_us": latency - 8,
            "ready_to_running_p99_us": latency - 4,
        }


@pytest.fixture(scope="module")
def usual():
    """The plan of a machine on which offload pays."""
    return plan(Machine())


def plan(machine, **changes):
    planned = Plan(scenario(**changes), Inputs(message_ns={"fifo": 40.0}), "fifo")
    planned.run(machine)
    return planned.results()


@pytest.mark.parametrize("truth", [0.013, 0.31, 1.0, 7.9])
@pytest.mark.parametrize("guess", [0.01, 0.5, 8.0])
def test_a_search_ends_within_its_resolution_of_the_truth(truth, guess):
    tried = []

    def fits(value):
        tried.append(value)
        yield []
        return value <= truth

    search = highest(fits, guess, 0.01, 8.0, 0.02)
    with pytest.raises(StopIteration) as end:
        next(search)
        while True:
            search.send([])
    low, high = end.value.value
    assert low <= truth < high <= low * 1.02 * (1 + 1e-9)
    assert len(tried) < 25


@pytest.mark.parametrize(("truth", "low", "high"), [(0.001, 0, 0.01), (100, 8, math.inf)])
def test_a_search_ends_at_its_bounds(truth, low, high):
    def fits(value):
        yield []
        return value <= truth

    search = highest(fits, 1.0, 0.01, 8.0, 0.02)
    with pytest.raises(StopIteration) as end:
        next(search)
        while True:
            search.send([])
    assert end.value.value == (low, high)


def test_the_gain_is_against_the_agent_on_one_of_the_machines_cores(usual):
    results = usual
    host, offload = 7 * 90_000, 8 * 90_000 * (1 - 0.0375)
    assert results["host_per_s"] == pytest.approx(host, rel=0.01)
    assert results["offload_per_s"] == pytest.approx(offload, rel=0.01)
    assert results["gain_share"] == pytest.approx(offload / host - 1, abs=0.015)
    assert results["cores_freed"] == pytest.approx(8 * (1 - host / offload), abs=0.1)
    assert report.verdict(results)["answer"] == "yes"


def test_the_break_even_is_the_speed_at_which_the_agent_just_sustains_the_hosts_load(usual):
    results = usual
    truth = 7 * 90_000 / 2_000_000
    assert results["breakeven_speed"] == pytest.approx(truth, rel=0.03)
    low, high = results["breakeven_interval"]
    assert low <= results["breakeven_speed"] <= high
    at_400 = results["breakeven"]["speeds"][0][LATENCIES_NS.index(400)]
    assert at_400 == pytest.approx(truth, rel=0.03)


def test_two_ipu_cores_break_even_at_half_the_speed(usual):
    of = usual["breakeven"]
    assert of["ipu_cores"] == [1, 2, 4]
    one, two, four = (speeds[0] for speeds in of["speeds"])
    assert (two / one, four / one) == (pytest.approx(0.5, rel=0.05), pytest.approx(0.25, rel=0.05))


def test_a_link_too_slow_for_any_speed_has_no_break_even():
    results = plan(Machine(link_tax=5.0))
    assert results["breakeven_speed"] is None
    assert results["gain_share"] < 0
    said = report.verdict(results)
    assert said["answer"] == "no"
    assert f"No IPU core of up to {SPEED_MOST:g} times" in " ".join(said["sentences"])


def test_an_agent_that_costs_nothing_pays_at_any_speed():
    results = plan(Machine(agent_per_s=1e12))
    assert results["breakeven_speed"] == 0
    assert f"any IPU core down to {SPEED_LEAST:g}" in " ".join(report.verdict(results)["sentences"])


def test_the_map_frees_more_with_a_faster_core_and_a_shorter_link(usual):
    rows = usual["map"]["cores_freed"]
    assert (len(rows), len(rows[0])) == (len(SPEEDS), len(LATENCIES_NS))

    def no_more(least, most):  # within what the coarse searches leave open: cores = 8 * (1 - 1 / gain)
        return least <= most + 0.04 * (8 - most)

    assert all(no_more(slow, fast) for one, other in pairwise(rows) for slow, fast in zip(one, other, strict=True))
    assert all(no_more(far, near) for row in rows for near, far in pairwise(row))


def test_the_cost_whose_absence_helps_most_is_named_first():
    results = plan(Machine(link_tax=3.0))
    assert results["costs"][0]["cost"] == "link.wire.one_way_ns"
    assert results["costs"][0]["seeds"] == 3
    said = report.verdict(results)
    assert said["limit"] == "link.wire.one_way_ns"
    assert "The single most limiting cost is link.wire.one_way_ns (375 ns)" in " ".join(said["sentences"])
    slow = report.verdict(plan(Machine(agent_per_s=900_000)))
    assert slow["limit"] == "agent.message_ns"


def test_where_no_cost_matters_the_workers_are_the_limit():
    said = report.verdict(plan(Machine(link_tax=0.0)))
    assert said["limit"] == ""
    assert "the workers are the limit" in " ".join(said["sentences"])


def test_costs_that_the_mitigations_avoid_are_not_asked_about():
    planned = Plan(scenario(), Inputs(message_ns={"fifo": 40.0}), "fifo")
    assert "link.host.wt_read_ns" in planned.free_costs
    assert "link.host.uc_read_ns" not in planned.free_costs
    assert "link.dma.setup_ns" not in planned.free_costs


def test_a_kernel_that_serves_more_is_told_first():
    said = report.verdict(plan(Machine(kernel_per_s=750_000)))
    assert said["answer"] == "kernel"
    assert re.match(r"Leave it to the kernel: its own scheduler sustains 7[45]\d\.\d k/s, fifo 6\d\d", said["headline"])


def test_whole_cores_are_tried_one_by_one():
    assert plan(Machine(link_tax=0.0))["workers_needed"] == 7
    assert plan(Machine(link_tax=5.0))["workers_needed"] == 9


def test_every_kind_of_link_has_a_row_and_the_scenarios_own_is_marked(usual):
    rows = usual["links"]
    assert [row["kind"] for row in rows] == ["coherent", "C2C", "CXL", "PCIe", "network"]
    assert [row["kind"] for row in rows if row["own"]] == ["PCIe"]
    changed = plan(Machine(), link={"costs": {"wire": {"one_way_ns": 700}}})["links"]
    assert [row["kind"] for row in changed if row["own"]] == ["mount-evans (the scenario's)"]
    assert {row["kind"]: row["one_way_ns"] for row in changed}["PCIe"] == 375


def test_propagation_reaches_posted_writes_once_and_reads_twice():
    planned = Plan(scenario(), Inputs(message_ns={"fifo": 40.0}), "fifo")
    link, far = load_link("mount-evans"), {(table, key): ns for table, key, ns in planned.at_latency(1_375).costs}
    assert far["wire", "one_way_ns"] == 1_375
    assert far["doorbell", "wire_ns"] == link.doorbell.wire_ns + 1_000
    assert far["host", "wt_read_ns"] == link.host.wt_read_ns + 2_000
    assert all(ns >= 0 for _, _, ns in planned.at_latency(0).costs)


def test_equal_runs_are_made_once():
    machine = Machine()
    planned = Plan(scenario(), Inputs(message_ns={"fifo": 40.0}), "fifo")
    planned.run(machine)
    assert planned.runs == len(machine.asked) == len(planned._known)


def test_where_the_host_meets_the_objective_at_no_load_there_is_no_answer():
    results = plan(Machine(worker_per_s=1e-3))
    said = report.verdict(results)
    assert said["answer"] == "open"
    assert "no load" in said["headline"]
    assert "<h1>" in report.render_report(results)


def test_the_report_is_one_page_with_contours_that_fetches_nothing(usual):
    results = usual
    page = report.render_report(results)
    assert page.count("<svg") == 4
    assert report.verdict(results)["headline"].split(":")[0] in page
    assert not [part for part in page.split('src="')[1:] if not part.startswith("data:")]
    assert report.render_report(results) == page


def test_other_results_are_refused():
    with pytest.raises(ConfigError, match="no results of a plan"):
        report.table({"kind": "sweep"})
