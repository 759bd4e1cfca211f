"""A recorded run once more: what is taken from a recording, and that a replay is the queue that the recorded demands make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from waveos import tape
from waveos.cli import run
from waveos.errors import ConfigError
from waveos.ipu_emulator import replay
from waveos.ipu_emulator.pool import Here
from waveos.sched.records import DECISION, MESSAGE, Message

GAP_NS, CPU = 100_000, 3


def recording(arrivals_ns, demands_ns, *, threads: int = 4) -> np.ndarray:
    """What a host says whose one CPU serves these demands first come, first served."""
    told, free_ns = [], 0
    for number, (at_ns, demand_ns) in enumerate(zip(arrivals_ns, demands_ns, strict=True)):
        tid, begin_ns = number % threads, max(at_ns, free_ns)
        free_ns = begin_ns + demand_ns
        told += [(at_ns, Message.THREAD_RUNNABLE, tid, -1, 0), (begin_ns, Message.THREAD_RUNNING, tid, CPU, 0)]
        told += [(free_ns, Message.THREAD_BLOCKED, tid, CPU, demand_ns)]
    records = np.zeros(len(told), MESSAGE)
    for record, (time_ns, kind, tid, cpu, ran_ns) in zip(records, sorted(told, key=lambda each: each[0]), strict=True):
        record["type"], record["time_ns"], record["tid"], record["cpu"], record["ran_ns"] = kind, time_ns, tid, cpu, ran_ns
    return records


def lindley_us(arrivals_ns, demands_ns) -> np.ndarray:
    took, free_ns = [], 0
    for at_ns, demand_ns in zip(arrivals_ns, demands_ns, strict=True):
        free_ns = max(at_ns, free_ns) + demand_ns
        took.append(free_ns - at_ns)
    return np.array(took) / 1e3


@pytest.fixture
def poisson() -> tuple[list[int], list[int]]:
    random = np.random.default_rng(7)
    return np.cumsum(random.exponential(GAP_NS, 400)).astype(int).tolist(), random.exponential(0.6 * GAP_NS, 400).astype(int).tolist()


def test_an_activation_arrives_when_its_thread_can_run_and_demands_the_time_it_took(poisson):
    demands = replay.demands_of(recording(*poisson, threads=400))
    assert demands.arrivals.time_ns.tolist() == [at - poisson[0][0] for at in poisson[0]]
    assert demands.arrivals.service_ns.tolist() == poisson[1]
    assert (demands.cpus, demands.threads, demands.unfinished, demands.classes) == (1, 400, 0, ["activation"])
    assert demands.measured()["activation"]["mean_us"] == pytest.approx(lindley_us(*poisson).mean())


def test_what_was_preempted_or_placed_again_is_one_activation_and_what_had_not_ended_is_counted():
    records = recording([1_000, 50_000, 90_000], [10_000, 10_000, 10_000], threads=3)
    more = np.zeros(3, MESSAGE)
    more["type"], more["tid"], more["cpu"] = [Message.THREAD_PREEMPTED, Message.THREAD_RUNNABLE, Message.THREAD_RUNNABLE], [0, 0, 9], -1
    more["time_ns"], more["front"] = [5_000, 6_000, 95_000], [0, 1, 0]
    both = np.concatenate([records, more])
    demands = replay.demands_of(both[np.argsort(both["time_ns"], kind="stable")])
    assert demands.arrivals.service_ns.tolist() == [10_000] * 3
    assert demands.unfinished == 1


def test_lost_messages_end_what_had_begun(poisson):
    records = recording([1_000, 50_000, 90_000, 130_000], [10_000] * 4)
    records[1]["type"] = Message.RESYNC
    assert len(replay.demands_of(records).took_ns) == 3


def test_without_two_whole_activations_there_is_nothing_to_replay():
    with pytest.raises(ConfigError, match="holds 0 whole activations"):
        replay.demands_of(np.zeros(0, MESSAGE))


def test_fifo_on_a_host_without_costs_takes_as_long_as_theory_says(poisson):
    demands = replay.demands_of(recording(*poisson, threads=400))
    scenario = replay.scenario_of(demands, "here", ["fifo"], {}, "ideal", "ideal")
    ideal = scenario.model_copy(update={"link": scenario.link.model_copy(update={"on_host": "ideal"})})
    compared = replay.comparison_of(ideal, demands, {"fifo": 0.0}, "offload")
    compared.run(Here(), compared.searches(saturation=False))
    [config] = compared.results()["configs"]
    of = config["points"][0]["classes"]["activation"]
    assert of["count"] >= 395  # the run ends with the last arrival
    assert of["mean_us"] == pytest.approx(lindley_us(*poisson).mean(), rel=0.02)


def test_a_recording_is_replayed_by_the_command_with_its_own_policy_beside(tmp_path, capsys, poisson):
    path = tmp_path / "recording.tape"
    tape.write(path, {"policy": "fifo", "params": {}, "cpus": [CPU]}, recording(*poisson), np.zeros(2, DECISION))
    assert len(tape.read(path)[2]) == 2
    assert run(["replay", str(path), "--policy", "round_robin", "-p", "quantum_us=20", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [each["policy"] for each in results["configs"]] == ["fifo", "round_robin"]
    fifo, round_robin = (each["points"][0] for each in results["configs"])
    assert fifo["preemptions"] == 0 < round_robin["preemptions"]
    assert results["recorded"]["policy"] == "fifo"
    assert any("arrivals are as they were recorded" in note for note in results["notes"])


@pytest.mark.parametrize(
    ("facts", "cut", "said"),
    [(None, 0, "is no tape of Wave"), ({"policy": "fifo"}, 1 << 20, "holds 0 whole activations")],
)
def test_what_cannot_be_replayed_is_said_in_a_line(tmp_path: Path, capsys, poisson, facts, cut, said):
    path = tmp_path / "x.tape"
    if facts is None:
        path.write_text("no")
    else:
        tape.write(path, facts, np.zeros(0, MESSAGE), np.zeros(0, DECISION))
    assert run(["replay", str(path), "--policy", "fifo"]) == 2
    assert said in capsys.readouterr().err


def test_a_tape_of_another_version_is_refused_with_what_to_do(tmp_path, capsys):
    path = tmp_path / "old.tape"
    tape.begin(path, {"policy": "fifo"})
    path.write_bytes(path.read_bytes().replace(b'"version": ', b'"version": 9'))
    assert run(["replay", str(path), "--policy", "fifo"]) == 2
    assert "record it anew" in capsys.readouterr().err
