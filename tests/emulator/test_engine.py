"""The machine as a whole: what must be equal is equal, what must add up adds up, what must be dearer is dearer."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from waveos.errors import ConfigError
from waveos.ipu_emulator.profile import MITIGATIONS, HostProfile, link_costs, load_host, load_link
from waveos.ipu_emulator.sched import RequestClass, Service, Setup, Simulation, engine, simulate
from waveos.ipu_emulator.sched.machine import REQUEST
from waveos.policy import policy_names
from waveos.sched.records import Message
from waveos.trace import RunEnd, TraceKind

GET = RequestClass("GET", Service(fixed_ns=10_000))
MIXED = (
    RequestClass("GET", Service("exponential", mean_ns=10_000), share=0.98, slo_ns=200_000, qos=1),
    RequestClass("RANGE", Service("exponential", mean_ns=300_000), share=0.02, slo_ns=5_000_000),
)
BASE = Setup("shinjuku", 250_000, MIXED, duration_ns=20_000_000, message_ns=40, seed=7, workers=6, threads=256)
PLACES = ("kernel", "on-host", "offload")
POLICIES = ("fifo", "shinjuku", "shinjuku_mq", "edf", "mlfq")


def base(**changes):
    return replace(BASE, **changes)


def place(where, policy="shinjuku", **changes):
    return base(placement=where, policy="kernel" if where == "kernel" else policy, **changes)


def run(setup):
    """A whole run, with the machine as it is in the end."""
    simulation = Simulation(setup)
    while not simulation.advance(1_000_000_000):
        pass
    return simulation.result(), simulation.machine[0]


def requests(*triples):
    """A trace: (arrival_ns, service_ns, class)."""
    made = np.zeros(len(triples), REQUEST)
    for record, (arrival_ns, service_ns, k) in zip(made, triples, strict=True):
        record["arrival_ns"], record["service_ns"], record["request_class"] = arrival_ns, service_ns, k
    return made


# ── equal and unequal ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", PLACES)
def test_equal_seeds_give_one_trace_ten_times_over(where):
    assert len({simulate(place(where, duration_ns=3_000_000)).trace_hash for _ in range(10)}) == 1


@pytest.mark.parametrize("where", PLACES)
def test_other_seeds_give_other_traces(where):
    assert len({simulate(place(where, duration_ns=3_000_000, seed=seed)).trace_hash for seed in range(10)}) == 10


def test_a_run_in_small_slices_is_the_same_run():
    simulation = Simulation(BASE)
    while not simulation.advance(0):
        pass
    assert simulation.result().trace_hash == simulate(BASE).trace_hash


@pytest.mark.parametrize("policy", POLICIES)
def test_without_link_costs_and_at_equal_speed_offload_is_on_host_to_the_nanosecond(policy):
    same = base(policy=policy, link="ideal", speed=1.0, samples=10_000)
    here, there = (simulate(replace(same, placement=where)) for where in ("on-host", "offload"))
    assert len(here.samples) > 3_000
    assert here.samples.tobytes() == there.samples.tobytes()
    assert here.trace_hash == there.trace_hash


def test_the_same_seed_brings_the_same_requests_to_every_policy_and_place():
    def asked(setup):
        samples = np.sort(simulate(replace(setup, samples=10_000)).samples, order="arrival_ns")
        return [(int(s["arrival_ns"]), int(s["request_class"])) for s in samples]

    setups = [place(where, policy) for where in PLACES for policy in (POLICIES if where != "kernel" else ("kernel",))]
    first, *others = [asked(setup) for setup in setups]
    assert len(first) > 3_000
    assert all(each == first for each in others)


def test_services_are_the_same_whatever_serves_them():
    """A thread that is never preempted takes its service time and what the ticks add; with none, exactly its service time."""
    host = load_host("server").model_copy(update={"tick_period_us": 0, "switch_ns": 0})
    one, other = (simulate(base(policy=name, host=host, samples=5_000, load_per_s=60_000)).samples for name in ("fifo", "fifo_percpu"))
    spent = [{int(s["arrival_ns"]): int(s["sojourn_ns"] - s["wait_ns"]) for s in samples} for samples in (one, other)]
    assert spent[0] == spent[1]


# ── what adds up ─────────────────────────────────────────────────────────────────────────────────────────────────────


def total(result, machine):
    done = sum(int(machine["done"][k][0]) for k in range(len(result.classes)))
    return done, sum(each.unfinished for each in result.classes.values())


@pytest.mark.parametrize("policy", policy_names("sched"))
@pytest.mark.parametrize("load_per_s", [50_000, 2_000_000])
def test_every_request_is_done_unfinished_or_refused(policy, load_per_s):
    result, machine = run(base(policy=policy, load_per_s=load_per_s, duration_ns=4_000_000, threads=40))
    done, unfinished = total(result, machine)
    assert done + unfinished + result.refused == machine["arrived"]
    assert result.saturated == (load_per_s == 2_000_000)
    assert (unfinished == 0) == (load_per_s == 50_000)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (1, 7), (3, 2), (8, 300)])
def test_the_smallest_machines_serve_every_request(where, workers, threads):
    setup = place(where, workers=workers, threads=threads, load_per_s=25_000 * min(workers, threads), classes=(GET,), duration_ns=5_000_000)
    result, machine = run(setup)
    assert total(result, machine) == (machine["arrived"], 0)
    assert machine["arrived"] > 50


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("policy", [name for name in policy_names("sched") if name != "fifo_percpu"])
def test_no_thread_waits_while_a_cpu_idles_once_all_is_told(policy, where):
    assert simulate(place(where, policy)).unserved == 0


def test_workers_are_busy_for_exactly_the_work_there_was():
    setup = base(policy="fifo", arrivals=requests(*((i * 50_000, 12_345, 0) for i in range(200))), classes=(GET,), duration_ns=11_000_000)
    _, machine = run(setup)
    assert machine["busy_ns"] == 200 * 12_345
    assert machine["switches"] == machine["committed"] == 200


@pytest.mark.parametrize("policy", ["shinjuku", "round_robin", "edf", "srpt", "mlfq"])
def test_preemption_loses_and_invents_no_work(policy):
    host = load_host("server").model_copy(update={"tick_period_us": 0})
    rng = np.random.default_rng(3)
    times, works = np.sort(rng.integers(0, 10**7, 900)), rng.integers(500, 90_000, 900)
    trace = requests(*((int(times[k]), int(works[k]), k % 2) for k in range(900)))
    result, machine = run(base(policy=policy, host=host, arrivals=trace, params={} if policy in ("edf", "srpt") else {"quantum_us": 10}))
    assert result.preemptions > 50
    assert machine["busy_ns"] == trace["service_ns"].sum()


@pytest.mark.parametrize("where", ["on-host", "offload"])
def test_a_demoted_thread_makes_way_without_a_decision_at_the_cost_of_the_hosts_own_interrupt(where):
    """One long request is demoted while nobody waits; each short one that comes then takes its CPU, to the nanosecond, and no agent is waited for.

    The agent has heard of it meanwhile and staged it behind, which the host sees as it looks, a prefetch having begun as the interrupt came.
    """
    trace = requests((0, 400_000, 1), *((60_000 + 30_000 * i, 5_000, 0) for i in range(8)))
    host = load_host("server").model_copy(update={"tick_period_us": 0})
    result, machine = run(
        place(where, "mlfq", arrivals=trace, workers=1, threads=16, samples=100, duration_ns=2_000_000, host=host, params={"quantum_us": 20})
    )
    cost = machine["cost"]
    told = 2 * cost["write_ns"] + cost["flush_ns"]  # that one was preempted and the other runs
    look = max(min(cost["hit_ns"], cost["read_ns"]), cost["read_ns"] - cost["interrupt_ns"])
    way = look + cost["wake_ns"] + cost["write_ns"] + cost["flush_ns"] + cost["ipi_wire_ns"] + 1 + cost["interrupt_ns"] + told + cost["switch_ns"]
    short = result.samples[result.samples["request_class"] == 0]
    assert short["sojourn_ns"].tolist() == [way + 5_000] * 8
    assert result.preemptions == 8
    assert machine["busy_ns"] == trace["service_ns"].sum()
    assert machine["switches"] == machine["committed"] + 8


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("policy", ["round_robin", "shinjuku", "mlfq"])
def test_a_short_request_waits_for_no_more_than_the_slice_of_a_long_one(policy, where):
    """Also if it was staged behind that one before the slice was over."""
    trace = requests((0, 400_000, 0), (10_000, 5_000, 0))
    setup = base(placement=where, policy=policy, arrivals=trace, classes=(GET,), workers=1, threads=16, samples=10, duration_ns=2_000_000)
    result, _ = run(replace(setup, params={"quantum_us": 20}))
    assert result.samples["sojourn_ns"][0] < 20_000 - 10_000 + 5_000 + 10_000


def test_a_demotion_that_comes_too_late_is_dropped():
    """The thread blocks while its demotion is on its way: the next one, which was staged behind it, is as fresh as any, and does not make way for the third."""
    late, in_time = 0, 0
    for ended_ns in range(28_000, 36_000, 250):
        trace = requests((0, ended_ns, 1), (10_000, 20_000, 0), (ended_ns + 6_000, 20_000, 0))
        result, machine = run(place("offload", "mlfq", arrivals=trace, workers=1, threads=4, samples=10, duration_ns=2_000_000))
        assert len(result.samples) == 3
        assert machine["busy_ns"] == trace["service_ns"].sum()
        if result.samples["request_class"][0] == 1:
            assert result.preemptions == 0
            late += result.outcomes["stale"]  # of the preemption that was sent with the demotion
        else:
            in_time += 1
    assert late and in_time


def test_outcomes_add_up():
    for policy in ("shinjuku", "round_robin", "edf"):
        result, machine = run(base(policy=policy))
        answered = sum(result.outcomes.values())
        assert result.outcomes["stale"] > 0
        assert result.outcomes["committed"] >= result.switches == machine["committed"]  # a preemption without a thread is one more
        assert result.outcomes["committed"] - result.switches <= result.preemptions <= result.switches
        assert answered <= result.decisions
        assert result.outcomes["invalid"] == result.outcomes["target_gone"] == 0


def test_a_stale_decision_is_never_applied():
    """Every start is of a thread that was told to be runnable since it last started."""
    result = simulate(base(policy="round_robin", params={"quantum_us": 15}, record=200_000))
    assert len(result.record) < 200_000
    runnable, stale = set(), 0
    for m in result.record:
        tid = int(m["tid"])
        if m["type"] in (Message.THREAD_RUNNABLE, Message.THREAD_PREEMPTED):
            runnable.add(tid)
        elif m["type"] == Message.TXN_OUTCOME and tid >= 0:
            stale += int(m["outcome"] == 1)
            if m["outcome"] == 0:
                runnable.remove(tid)  # KeyError: applied twice
    assert stale > 0
    # Whatever happened to the thread moved its number on: the number alone refuses, and a thread's state is never what saves it.
    assert result.outcomes["target_on_cpu"] == result.outcomes["target_not_runnable"] == 0


def test_what_a_thread_did_is_told_in_the_order_it_did_it():
    """The sequence numbers that the agent meets never fall, for any thread, on any link."""
    for link in ("mount-evans", "ideal", "on-host"):
        record = simulate(base(link=link, record=200_000, threads=8, load_per_s=150_000, classes=(GET,))).record
        for tid in range(8):
            seqs = record["seq"][(record["tid"] == tid) & (record["type"] != Message.TXN_OUTCOME)]
            assert len(seqs) > 100
            assert np.all(np.diff(seqs) >= 0)


def test_ticks_lengthen_a_run_by_exactly_their_cost():
    def sojourn(tick_ns):
        host = load_host("ideal").model_copy(update={"tick_period_us": 100, "tick_ns": tick_ns})
        setup = base(policy="fifo", link="ideal", message_ns=0, host=host, arrivals=requests((50_000, 1_000_000, 0)), classes=(GET,), samples=1)
        return int(simulate(setup).samples["sojourn_ns"][0])

    assert sojourn(0) == 1_000_000
    assert sojourn(1_000) == 1_000_000 + 10 * 1_000
    assert sojourn(10_000) == 1_000_000 + 11 * 10_000  # the tenth tick pushes the end past an eleventh


def test_requests_at_time_zero_and_at_one_instant_are_all_served():
    trace = requests(*((0, 1_000, 0) for _ in range(50)), *((777, 1, 0) for _ in range(50)))
    for where in PLACES:
        result, machine = run(place(where, arrivals=trace, classes=(GET,), threads=20, samples=100, duration_ns=1_000_000))
        assert total(result, machine) == (100, 0)
        assert sorted(result.samples["arrival_ns"].tolist()) == [0] * 50 + [777] * 50


def test_requests_from_the_end_of_the_run_on_do_not_come():
    trace = requests((999_999, 1, 0), (1_000_000, 1, 0), (5_000_000, 1, 0))
    _, machine = run(base(arrivals=trace, classes=(GET,), duration_ns=1_000_000))
    assert machine["arrived"] == 1


def test_first_come_first_served_is_that_to_the_nanosecond_at_no_cost():
    """One worker, nothing costs anything: Lindley's recursion, request by request."""
    one = RequestClass("x", Service("exponential", mean_ns=10_000))
    setup = base(policy="fifo", host="ideal", link="ideal", message_ns=0, workers=1, load_per_s=80_000, classes=(one,))
    samples = simulate(replace(setup, samples=5_000)).samples
    assert len(samples) > 1_000
    free_ns = 0
    for s in samples:
        service = int(s["sojourn_ns"] - s["wait_ns"])
        free_ns = max(free_ns, int(s["arrival_ns"])) + service
        assert s["sojourn_ns"] == free_ns - s["arrival_ns"]


# ── dearer and cheaper ───────────────────────────────────────────────────────────────────────────────────────────────

WIDE = requests(*((200_000 * (i + 1), 3_000, 0) for i in range(12)))


def unloaded_ns(link, host, mitigations=MITIGATIONS, message_ns=40.0):
    """From runnable until its switch is done, one request at a time."""
    setup = base(
        policy="fifo", arrivals=WIDE, classes=(GET,), duration_ns=3_000_000, workers=2, threads=16, link=link, host=host, mitigations=mitigations
    )
    simulation = Simulation(replace(setup, message_ns=message_ns, record=1_000))
    while not simulation.advance(1_000_000_000):
        pass
    assert simulation.machine["switches"][0] == len(WIDE)
    return simulation.result().decision_mean_ns


LINK, HOST = load_link("mount-evans"), load_host("server")
LINK_KEYS = [(room, key) for room in ("host", "agent", "wire", "doorbell") for key in type(getattr(LINK, room)).model_fields if key.endswith("_ns")]
HOST_KEYS = [key for key in type(HOST).model_fields if key.endswith("_ns")]
subsets = st.sets(st.sampled_from(MITIGATIONS)).map(lambda chosen: tuple(sorted(chosen)))
costs = st.integers(0, 3_000)


def with_cost(profile, room, key, value):
    return profile.model_copy(update={room: getattr(profile, room).model_copy(update={key: value})})


@st.composite
def physical_links(draw):
    """A line costs no more than its eight words, a hit no more than a miss."""
    words = {key: draw(st.integers(0, 800)) for key in ("host_read", "host_write", "agent_read", "agent_write")}

    def up_to(most):
        return draw(st.integers(0, most))

    invalidate = up_to(8 * words["host_read"])
    fill = up_to(8 * words["host_read"] - invalidate)
    buffer = up_to(8 * words["host_write"])
    host = LINK.host.model_copy(
        update={
            "uc_read_ns": words["host_read"],
            "uc_write_ns": words["host_write"],
            "wc_write_ns": buffer,
            "wc_flush_ns": up_to((8 * words["host_write"] - buffer) // 2),
            "wt_read_ns": fill,
            "wt_hit_ns": up_to(fill + invalidate),
            "invalidate_ns": invalidate,
        }
    )
    agent = LINK.agent.model_copy(
        update={
            "uc_read_ns": words["agent_read"],
            "uc_write_ns": words["agent_write"],
            "wb_read_ns": up_to(8 * words["agent_read"]),
            "wb_write_ns": up_to(8 * words["agent_write"]),
        }
    )
    doorbell = LINK.doorbell.model_copy(update={"send_ns": draw(costs), "wire_ns": draw(costs), "receive_ns": draw(costs)})
    return LINK.model_copy(
        update={"host": host, "agent": agent, "doorbell": doorbell, "wire": LINK.wire.model_copy(update={"one_way_ns": draw(costs)})}
    )


few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@few
@given(link=physical_links(), on=subsets, which=st.sampled_from(LINK_KEYS), more=costs)
def test_a_decision_costs_no_less_when_any_cost_of_the_link_rises(link, on, which, more):
    room, key = which
    dearer = with_cost(link, room, key, getattr(getattr(link, room), key) + more)
    assert unloaded_ns(dearer, HOST, on) >= unloaded_ns(link, HOST, on)


@settings(few, max_examples=20)
@given(on=subsets, key=st.sampled_from(HOST_KEYS), more=st.integers(0, 3_000))
def test_a_decision_costs_no_less_when_any_cost_of_the_host_rises(on, key, more):
    cost = getattr(HOST, key)
    dearer = HOST.model_copy(update={key: (*cost, more) if isinstance(cost, tuple) else cost + more})
    assert unloaded_ns(LINK, dearer, on) >= unloaded_ns(LINK, HOST, on)


@settings(few, max_examples=15)
@given(on=subsets, message_ns=st.integers(0, 5_000), more=st.integers(0, 5_000))
def test_a_decision_costs_no_less_when_the_agent_is_slower(on, message_ns, more):
    assert unloaded_ns(LINK, HOST, on, message_ns + more) >= unloaded_ns(LINK, HOST, on, message_ns)


@settings(few, max_examples=60)
@given(link=physical_links(), on=subsets, added=st.sampled_from(MITIGATIONS))
def test_no_mitigation_makes_an_unloaded_decision_dearer(link, on, added):
    assert unloaded_ns(link, HOST, {*on, added}) <= unloaded_ns(link, HOST, set(on) - {added})


def test_the_unloaded_decision_is_the_sum_of_its_parts():
    """Told, flushed, seen, decided, rung, taken, read, reported, switched: nothing else."""
    c = link_costs(LINK)
    parts = c.host_write_ns + c.host_flush_ns + c.wire_ns + c.agent_read_ns + round(40 / LINK.relative_speed) + c.agent_write_ns
    parts += (
        c.kick_send_ns + c.kick_wire_ns + max(c.kick_receive_ns + c.host_hit_ns, c.host_read_ns) + c.host_write_ns + c.host_flush_ns + HOST.switch_ns
    )
    assert unloaded_ns(LINK, HOST) == pytest.approx(parts, rel=1 / 256)


@functools.cache
def p99(policy, where, share=0.005):
    get, scan = RequestClass("GET", Service(fixed_ns=10_000), share=1 - share), RequestClass("RANGE", Service(fixed_ns=5_000_000), share=share)
    load = 0.6 * 8 / (10e-6 * (1 - share) + 5e-3 * share)
    setup = Setup(policy, load, (get, scan), placement=where, duration_ns=600_000_000, warmup_ns=30_000_000, message_ns=40, seed=5)
    return simulate(setup).classes["GET"].p99_ns


@pytest.mark.parametrize("where", PLACES)
def test_preemption_shortens_the_tail_of_short_requests_by_far(where):
    assert p99("fifo", where) > 10 * p99("shinjuku", where)


def test_without_any_mitigation_the_same_load_costs_clearly_more():
    """Stalls of the workers and the time to a decision; no figure is put in, only the order."""
    on, off = (run(base(mitigations=each)) for each in (MITIGATIONS, ()))
    assert off[0].decision_mean_ns > 2 * on[0].decision_mean_ns
    assert off[0].host_cores_policy > 2 * on[0].host_cores_policy
    assert off[0].agent_busy_share > 2 * on[0].agent_busy_share


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_agent_saturates_as_a_server_does():
    """Each request is at least told, committed and blocked: three messages. The slower the agent, the closer throughput comes to one over that."""
    message_ns = 50_000
    setup = base(policy="fifo", classes=(GET,), load_per_s=60_000, message_ns=message_ns, speed=1.0, duration_ns=300_000_000, threads=512)
    result = simulate(setup)
    assert result.saturated
    assert result.agent_busy_share > 0.99
    most = 1e9 / (3 * message_ns)
    assert 0.6 * most < result.throughput_per_s < 1.01 * most
    assert simulate(replace(setup, speed=2.0)).throughput_per_s == pytest.approx(2 * result.throughput_per_s, rel=0.05)


def test_saturated_is_said_when_requests_stay_undone_and_not_before():
    capacity = 6 / 11e-6
    assert not simulate(base(policy="fifo", classes=(GET,), load_per_s=0.5 * capacity)).saturated
    assert simulate(base(policy="fifo", classes=(GET,), load_per_s=3 * capacity)).saturated


def lose(setup, after):
    """Run `setup`, and lose messages after so many events, as a queue that is full there would; None: the run was over before."""
    simulation = Simulation(setup)
    engine.begin(simulation.machine)
    simulation._begun = True
    engine.advance(simulation.machine, after)
    m = simulation.machine[0]
    while m["up_tail"] == m["up_head"]:
        if engine.advance(simulation.machine, 1) != engine.RUNNING_ON:
            return None
    m["lost"] = 1
    while not simulation.advance(1_000_000_000):
        pass
    return simulation


@pytest.mark.parametrize("policy", ["fifo", "shinjuku"])
@pytest.mark.parametrize(("workers", "threads"), [(1, 4), (8, 512)])
def test_whenever_messages_are_lost_the_agent_is_told_all_anew_and_every_request_finishes(policy, workers, threads):
    setup = base(policy=policy, workers=workers, threads=threads, load_per_s=60_000 * workers, classes=(GET,), duration_ns=3_000_000)
    for k in range(25):
        simulation = lose(replace(setup, seed=k), 40 + 17 * k)
        assert simulation is not None
        result, machine = simulation.result(), simulation.machine[0]
        assert result.overflowed > 0 or result.resyncs == 1
        assert result.resyncs == 1
        assert total(result, machine) == (machine["arrived"], 0)


@pytest.mark.parametrize("policy", ["fifo", "shinjuku", "round_robin"])
def test_a_queue_that_overflows_is_counted_and_every_request_still_finishes(policy):
    """Eight requests at once run on eight CPUs and end while a very slow agent reads one batch: three messages a CPU.

    A `Setup.queue` that may be set holds more than is ever under way, so the engine's own limit is made smaller here.
    """
    bursts = requests(*(((2 + 10 * i) * 1_000_000, 10_000, 0) for i in range(9) for _ in range(8)))
    simulation = Simulation(base(policy=policy, workers=8, threads=16, arrivals=bursts, message_ns=30_000, classes=(GET,), duration_ns=95_000_000))
    simulation.machine["up_cap"] = 18  # what the replay of eight idle CPUs takes, and one more
    while not simulation.advance(1_000_000_000):
        pass
    result, machine = simulation.result(), simulation.machine[0]
    assert result.overflowed >= 9
    assert result.resyncs >= 9
    assert total(result, machine) == (len(bursts), 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"placement": "moon"}, "no placement 'moon'"),
        ({"load_per_s": 0}, "more than 0 is needed"),
        ({"load_per_s": -1}, "more than 0 is needed"),
        ({"load_per_s": float("nan")}, "more than 0 is needed"),
        ({"classes": ()}, "no request class"),
        ({"workers": 0}, "workers = 0"),
        ({"duration_ns": 0}, "duration_ns = 0"),
        ({"queue": 100}, "it must hold the host's state"),
        ({"queue": 1 << 20}, "at most 262144"),
        ({"mitigations": ("wbb",)}, "no mitigation 'wbb' (did you mean 'wb'?)"),
        ({"link": "mount-everest"}, "no link profile 'mount-everest' (did you mean 'mount-evans'?)"),
        ({"host": "servr"}, "no host profile 'servr' (did you mean 'server'?)"),
        ({"classes": (GET,) * 33}, "at most 32"),
        ({"classes": (RequestClass("x", Service("samples")),)}, "no measured service times"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(changes, told):
    with pytest.raises(ConfigError) as error:
        Simulation(base(**changes))
    assert told in str(error.value)


# ── what is written down ─────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def traced():
    return np.sort(simulate(base(trace_from_ns=0, trace_for_ns=5_000_000, load_per_s=400_000)).trace, order="time_ns", kind="stable")


def test_a_cpu_runs_one_thread_at_a_time_and_a_thread_is_on_one_cpu():
    running = {}
    begun = 0
    for e in traced():
        if e["kind"] == TraceKind.RUN_BEGIN:
            assert e["cpu"] not in running
            assert e["tid"] not in running.values()
            running[e["cpu"]] = e["tid"]
            begun += 1
        elif e["kind"] == TraceKind.RUN_END:
            assert running.pop(e["cpu"]) == e["tid"]
        elif e["kind"] == TraceKind.IDLE_BEGIN:
            assert e["cpu"] not in running
    assert begun > 500


def test_a_trace_lies_in_its_window_and_speaks_of_what_there_is():
    window = simulate(base(trace_from_ns=2_000_000, trace_for_ns=1_000_000)).trace
    assert len(window) > 200
    assert window["time_ns"].min() >= 2_000_000
    assert window["time_ns"].max() < 3_000_000
    assert set(window["kind"].tolist()) <= set(map(int, TraceKind))
    assert window["cpu"].min() >= -1
    assert window["cpu"].max() < 6
    assert window["tid"].min() >= -1
    assert window["tid"].max() < 256


def test_looking_at_a_run_does_not_change_it():
    assert simulate(base(trace_from_ns=0, trace_for_ns=1_000_000, samples=100, record=100)).trace_hash == simulate(BASE).trace_hash


def test_every_decision_that_was_applied_had_been_made_before():
    made = {int(e["extra"]): int(e["time_ns"]) for e in traced() if e["kind"] == TraceKind.DECISION_MADE}
    answered = [e for e in traced() if e["kind"] in (TraceKind.DECISION_APPLIED, TraceKind.DECISION_REFUSED)]
    assert len(answered) > 500
    assert all(e["time_ns"] >= made[int(e["extra"])] for e in answered)
    assert len({int(e["extra"]) for e in answered}) == len(answered)


def stalls_time(tmp_path, handlers):
    """Whether virtual time stands still under a policy with these handlers over a queue."""
    path = tmp_path / "stalling.py"
    path.write_text(
        "from waveos import sched\nfrom waveos.policy import Policy, pop, push, ring, size\n"
        "class Stalling(Policy, subsystem=sched, name='stalling'):\n    runq = ring(64)\n"
        "    def thread_runnable(self, msg, txns):\n        push(self.runq, msg.tid, front=msg.front)\n"
        "    def cpu_idle(self, msg, txns):\n        if size(self.runq): sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)\n" + handlers
    )
    simulation = Simulation(base(policy=str(path), threads=64, classes=(GET,)))
    engine.begin(simulation.machine)
    seen = set()
    for _ in range(10):
        engine.advance(simulation.machine, 1_000)
        seen.add(int(simulation.machine["now_ns"][0]))
    return len(seen) < 5


SETS = "    def thread_running(self, msg, txns):\n        sched.set_timer(txns, msg.cpu, msg.time_ns + {first})\n"
AGAIN = "    def timer_expired(self, msg, txns):\n        sched.set_timer(txns, msg.cpu, msg.time_ns + {next})\n"


def test_a_periodic_timer_lets_time_pass(tmp_path):
    assert not stalls_time(tmp_path, SETS.format(first=1_000) + AGAIN.format(next=1_000))
    assert not stalls_time(tmp_path, SETS.format(first=0))


# ── known weaknesses, each with its way out ──────────────────────────────────────────────────────────────────────────


def test_after_a_replay_the_agent_believes_of_every_cpu_what_is_true():
    setup = base(policy="fifo", placement="on-host", classes=(GET,), duration_ns=5_000_000)
    for workers, threads in ((4, 64), (8, 512)):
        for k in range(40):
            simulation = lose(replace(setup, workers=workers, threads=threads, load_per_s=70_000 * workers, seed=k), 50 + 37 * k)
            if simulation is None:
                continue
            m = simulation.machine[0]
            assert m["runtime"]["cpu"]["running"][:workers].tolist() == m["cpu"]["tid"][:workers].tolist()


def test_requests_beyond_the_backlog_are_refused():
    assert simulate(base(classes=(GET,), load_per_s=3_000_000, threads=8, backlog=10, duration_ns=1_000_000)).refused > 0


def test_a_tick_that_takes_longer_than_its_period_is_refused():
    with pytest.raises(ValidationError):
        HostProfile.model_validate(HOST.model_dump() | {"tick_period_us": 1, "tick_ns": 1_000})


def test_a_run_end_tells_what_was_run_since_the_begin():
    since, wrong = {}, 0
    for e in traced():
        if e["kind"] == TraceKind.RUN_BEGIN:
            since[int(e["cpu"])] = int(e["time_ns"])
        elif e["kind"] == TraceKind.RUN_END:
            wrong += e["extra"] > e["time_ns"] - since[int(e["cpu"])]
    assert wrong == 0
    assert any(e["kind"] == TraceKind.RUN_END and e["value"] == RunEnd.PREEMPTED for e in traced())


@pytest.mark.parametrize("changes", [{"workers": 1_025}, {"threads": 65_537, "queue": 262_144}])
def test_more_cpus_or_threads_than_there_can_be_are_refused(changes):
    with pytest.raises(ConfigError):
        Simulation(base(**changes))


@pytest.mark.parametrize("trace", [((5_000, 1, 0), (1_000, 1, 0)), ((0, 1, 1),), ((-5, 1, 0),), ((0, -5, 0),)])
def test_a_trace_that_cannot_be_is_refused(trace):
    with pytest.raises(ConfigError):
        Simulation(base(arrivals=requests(*trace), classes=(GET,)))


def test_a_timer_that_is_set_to_now_when_it_expires_lets_time_pass(tmp_path):
    assert not stalls_time(tmp_path, SETS.format(first=0) + AGAIN.format(next=0))


QUEUE_FOR_A_CPU = """\
from waveos import sched
from waveos.policy import Policy, array

class Deep(Policy, subsystem=sched, name="deep", work_conserving=False):
    \"\"\"Stages everything on CPU 0, and preempts there whenever a thread starts.\"\"\"
    held = array(1)
    def thread_runnable(self, msg, txns):
        sched.run(txns, tid=msg.tid, cpu=0)
    def thread_running(self, msg, txns):
        sched.preempt(txns, 0)
    def cpu_idle(self, msg, txns):
        pass
"""


def test_a_cpus_queue_never_takes_more_decisions_than_it_holds(tmp_path):
    """A doorbell that takes long lets preemptions pile up behind what is staged; memory is never written beyond the queue."""
    path = tmp_path / "deep.py"
    path.write_text(QUEUE_FOR_A_CPU)
    link = with_cost(load_link("ideal"), "doorbell", "wire_ns", 400_000)
    arrivals = requests(*((1_000 + 40 * i, 3_000, 0) for i in range(400)))
    setup = base(policy=str(path), host="ideal", link=link, message_ns=10, arrivals=arrivals, threads=16, classes=(GET,), workers=2)
    simulation = Simulation(setup)
    engine.begin(simulation.machine)
    most = 0
    while engine.advance(simulation.machine, 1) == engine.RUNNING_ON:
        most = max(most, int(simulation.machine["cpu"]["down_n"][0, 0]))
        if simulation.machine["events"][0] > 20_000:
            break
    assert most <= simulation.machine["down"].shape[2]


# ── caches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def sojourns(steps, *arrivals, resume_ns=0, **more):
    """Of requests of 10 us one after another on one CPU, ns, where others cost a thread so much of its caches."""
    host = load_host("ideal").model_copy(update={"cold_ns": steps, "resume_ns": resume_ns})
    trace = requests(*((at, 10_000, 0) for at in arrivals))
    setup = Setup(
        **{
            "policy": "fifo",
            "load_per_s": 0.0,
            "classes": (GET,),
            "placement": "kernel",
            "workers": 1,
            "threads": 8,
            "host": host,
            "arrivals": trace,
            "samples": 99,
            "duration_ns": 1_000_000,
        }
        | more
    )
    return [int(each) for each in simulate(setup).samples["sojourn_ns"]]


def test_a_thread_that_has_had_the_cpu_last_finds_its_caches_warm():
    assert sojourns((1_000, 4_000), 10, 100_000, 200_000) == [10_000, 10_000, 10_000]


def test_each_turn_of_others_cools_a_threads_caches_by_the_steps_of_the_host():
    warm = sojourns((), *[10] * 4, *[200_000] * 4)
    cold = sojourns((1_000, 4_000), *[10] * 4, *[200_000] * 4)
    extra = np.diff([0, *np.subtract(cold, warm)[:4]]), np.diff([0, *np.subtract(cold, warm)[4:]])
    assert [each.tolist() for each in extra] == [[0, 1_000, 4_000, 4_000], [0, 4_000, 4_000, 4_000]]  # the one that was last comes first


def test_a_preempted_thread_pays_for_its_caches_each_time_it_goes_on():
    turns = {"policy": "round_robin", "params": {"quantum_us": 4}}
    free, paid = sojourns((), 10, 10, **turns), sojourns((), 10, 10, resume_ns=500, **turns)
    assert sojourns((), 10, resume_ns=500, **turns) == sojourns((), 10, **turns)
    # Turns of 4 us each, the time for the caches in them: 4, 3.5 and 2.5 of work, so that both third turns take 3 us instead of 2.
    assert np.subtract(paid, free).tolist() == [1_000, 2_000]
