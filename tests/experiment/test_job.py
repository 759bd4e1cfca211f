"""A scenario's run as the engine gets it, and what the engine refuses or stops."""

import numpy as np
import pytest

from waveos.errors import ConfigError, PolicyError
from waveos.ipu_emulator.inputs import Arrivals, Inputs
from waveos.ipu_emulator.job import Ask, Configuration, Job, link_of, setup_of
from waveos.ipu_emulator.pool import Here, Pool
from waveos.scenario import check_scenario


def scenario(**changes):
    raw = {
        "workload": {
            "loads_per_s": [200_000],
            "classes": [
                {"name": "GET", "share": 0.99, "service": {"fixed_us": 8, "exponential_us": 2}, "slo_us": 200, "qos": 1},
                {"name": "RANGE", "share": 0.01, "service": {"hyperexponential_us": [100, 500], "shares": [0.5, 0.5]}},
            ],
        },
        "policies": {"names": ["shinjuku"], "params": {"shinjuku": {"quantum_us": 20}}},
        "agent": {"message_ns": 40},
        "run": {"duration_ms": 20, "warmup_ms": 2},
    }
    return check_scenario(raw | changes)


INPUTS = Inputs(message_ns={"shinjuku": 40.0, "fifo": 40.0})


def job(world="offload", *, inputs=INPUTS, load=200_000.0, seed=3, policy="shinjuku", column="", workers=8, **changes):
    return Job(scenario(**changes), inputs, Ask(Configuration(policy, world, workers, column), load, seed))


def run(job):
    with Here() as pool:
        pool.submit(job)
        [(_, (point, _events))] = pool.finished()
    return point


def test_the_engine_gets_what_the_scenario_says():
    setup = setup_of(job())
    assert (setup.policy, setup.params, setup.placement, setup.workers, setup.seed) == ("shinjuku", {"quantum_us": 20}, "offload", 8, 3)
    assert (setup.duration_ns, setup.warmup_ns, setup.load_per_s) == (20_000_000, 2_000_000, 200_000.0)
    get, range_ = setup.classes
    assert (get.name, get.share, get.slo_ns, get.qos, get.service.form, get.service.fixed_ns, get.service.mean_ns) == (
        "GET", 0.99, 200_000, 1, "exponential", 8000, 2000,
    )  # fmt: skip
    assert range_.service.phases == ((0.5, 100_000), (0.5, 500_000))
    assert range_.service.average_ns() == pytest.approx(300_000)


def test_an_agent_on_the_host_has_a_host_core_and_the_coherent_link():
    setup = setup_of(job("on-host"))
    assert setup.link.coherent
    assert setup.speed == 1.0
    assert setup_of(job("offload")).speed is None
    assert setup_of(job("offload", agent={"message_ns": 40, "speed": 0.25})).speed == 0.25


def test_a_trace_is_stretched_to_the_load_and_repeated():
    trace = Arrivals(np.array([0, 10, 30, 60]), np.array([0, 1, 0, 0]), np.array([5, 6, 7, 0]))
    requests = setup_of(
        job(inputs=Inputs(message_ns=INPUTS.message_ns, arrivals=trace), load=1000.0, run={"duration_ms": 9, "warmup_ms": 1})
    ).arrivals
    assert requests["arrival_ns"].tolist() == [
        0,
        500_000,
        1_500_000,
        3_000_000,
        4_000_000,
        4_500_000,
        5_500_000,
        7_000_000,
        8_000_000,
        8_500_000,
        9_500_000,
    ]
    assert requests["service_ns"].tolist()[:5] == [5, 6, 7, 1, 5]
    assert requests["request_class"].tolist()[:5] == [0, 1, 0, 0, 0]


def test_costs_of_the_scenario_replace_the_profiles_and_leave_it_unverified():
    profile = link_of(scenario(link={"costs": {"wire": {"one_way_ns": 7}}}))
    assert profile.wire.one_way_ns == 7
    assert not profile.verified
    assert "costs of the scenario replace" in profile.source.replace("link.", "")


@pytest.mark.parametrize(
    ("costs", "told"),
    [
        ({"wires": {"one_way_ns": 7}}, "link.costs.wires: the profile 'mount-evans' has no such cost (did you mean 'wire'?)"),
        ({"wire": {"one_way_us": 7}}, "link.costs.wire: unknown key `one_way_us`; the key is `one_way_ns`, in nanoseconds: write one_way_ns = 7000"),
        ({"wire": {"one_way_ns": -7}}, "link.costs.wire.one_way_ns = -7: "),
    ],
)
def test_costs_that_cannot_be_are_refused(costs, told):
    with pytest.raises(ConfigError) as error:
        link_of(scenario(link={"costs": costs}))
    assert str(error.value).startswith(told)


@pytest.mark.parametrize("world", ["on-host", "offload"])
def test_a_run_answers_with_a_point(world):
    point = run(job(world))
    assert point["load_per_s"] == 200_000
    assert point["throughput_per_s"] == pytest.approx(200_000, rel=0.1)
    assert point["classes"]["GET"]["count"] > 3000
    assert 8 < point["classes"]["GET"]["p50_us"] < point["classes"]["GET"]["p99_us"] <= point["classes"]["GET"]["p999_us"]
    assert not point["saturated"]
    assert (point["host_cores_policy"] >= 1) == (world == "on-host")


def test_equal_jobs_give_equal_points_in_any_process():
    with Pool(2) as pool:
        for _ in range(2):
            pool.submit(job())
        answers = [point for _, (point, _events) in pool.finished()]
    assert answers[0] == answers[1] == run(job())


def test_places_that_are_compared_meet_the_same_requests():
    counts = [{name: of["count"] for name, of in run(job(world))["classes"].items()} for world in ("on-host", "offload")]
    assert counts[0] == counts[1]


def test_other_seeds_bring_other_requests():
    assert run(job(seed=1))["trace_hash"] != run(job(seed=2))["trace_hash"]


BAD = '''
from waveos.policy import Policy, ring, push, pop, size
from waveos import sched

class Bad(Policy, subsystem=sched, name="{name}"):
    """Does what it must not."""
    runq = ring({room})
    def thread_runnable(self, msg, txns):
        {runnable}
    def cpu_idle(self, msg, txns):
        {idle}
'''
GOOD_IDLE = "if size(self.runq): sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)"


def bad_policy(tmp_path, name, runnable="push(self.runq, msg.tid)", idle=GOOD_IDLE, room=65536):
    path = tmp_path / f"{name}.py"
    path.write_text(BAD.format(name=name, runnable=runnable, idle=idle, room=room))
    return str(path)


@pytest.fixture(scope="module")
def pool():
    with Pool(1) as shared:
        yield shared


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        ("raises", {"runnable": "raise ValueError('no')"}, "policy 'raises'"),
        ("other_cpu", {"idle": GOOD_IDLE.replace("msg.cpu", "999")}, "policy 'other_cpu'"),
        ("gone_thread", {"idle": "sched.run(txns, tid=4000, cpu=msg.cpu)"}, "policy 'gone_thread'"),
        ("overflows", {"room": 2, "idle": "pass"}, "policy 'overflows'"),
    ],
)
def test_a_policy_that_breaks_the_contract_is_named_in_one_line(pool, tmp_path, name, wrong, told):
    path = bad_policy(tmp_path, name, **wrong)
    with pytest.raises(PolicyError) as error:
        pool.submit(job(policy=path, inputs=Inputs(message_ns={path: 40.0}), policies={"names": [path]}))
        list(pool.finished())
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_policy_that_never_answers_is_stopped_and_named(tmp_path):
    path = bad_policy(tmp_path, "spin", runnable="\n        ".join(["i = 1", "while i: i += 2"]))
    with (
        Pool(1, patience_s=0.5) as alone,
        pytest.raises(PolicyError, match=r"policy '.*spin\.py' did not return from thread_runnable within 0\.5 s and was stopped"),
    ):
        alone.submit(job(policy=path, inputs=Inputs(message_ns={path: 40.0}), policies={"names": [path]}))
        list(alone.finished())
