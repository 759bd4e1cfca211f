"""The runtime's laws, each on a stream of records made by hand: a policy that only keeps a queue is correct."""

import textwrap

import numpy as np
import pytest

from waveos.errors import PolicyError
from waveos.outcome import Outcome
from waveos.policy import load_policy
from waveos.record import VERSION
from waveos.sched import DECISION, MESSAGE, OUTCOME, SUBSYSTEM, Decision, Message
from waveos.sched.laws import DEPTH, MOST_VOID, REFUSED_NS
from waveos.sched.records import KICKED, PREEMPT
from waveos.testing import Replayed

HEAD = """\
from waveos import sched
from waveos.policy import Policy, array, jitable, per_cpu, per_thread, pop, push, ring, size

class Made(Policy, subsystem=sched, name="made"{options}):
    runq = ring(64)
    seen = array(64)
    calls = array(1)
"""
QUEUE = """
def thread_runnable(self, msg, txns):
    self.calls[0] += 1
    self.seen[msg.tid] = 1 + msg.front
    push(self.runq, msg.tid, front=msg.front)

def cpu_idle(self, msg, txns):
    if size(self.runq):
        sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
"""


class Host:
    """Says by hand what a host would say, and shows what the runtime answers."""

    def __init__(self, policy, cpus=2, threads=32, ahead=0, present=True):
        self.replayed = Replayed(policy, cpus, threads, ahead)
        self.now_ns = 0
        self.seq = [0] * threads
        self.cpu_seq = [0] * cpus
        self.unsent = []
        if present:
            for cpu in range(cpus):
                self.say("cpu_new", cpu=cpu).say("cpu_idle", cpu=cpu)

    def say(self, kind, tid=-1, cpu=-1, front=0, **fields):
        m = np.zeros(1, MESSAGE)
        m["version"], m["subsystem"], m["type"] = VERSION, SUBSYSTEM, Message[kind.upper()] if isinstance(kind, str) else kind
        m["time_ns"], m["tid"], m["cpu"], m["front"] = self.now_ns, tid, cpu, front
        m["seq"] = self.seq[tid] if 0 <= tid < len(self.seq) else 0
        m["cpu_seq"] = self.cpu_seq[cpu] if 0 <= cpu < len(self.cpu_seq) else 0
        for field, value in fields.items():
            m[field] = value
        self.unsent.append(m)
        return self

    def wake(self, *tids, **fields):
        for tid in tids:
            self.seq[tid] += 1
            self.say("thread_runnable", tid, **fields)
        return self

    def block(self, tid, cpu, idle=True):
        self.seq[tid] += 1
        self.cpu_seq[cpu] += 1
        self.say("thread_blocked", tid, cpu)
        return self.say("cpu_idle", cpu=cpu) if idle else self

    def run_undecided(self, tid, cpu):
        self.seq[tid] += 1
        self.cpu_seq[cpu] += 1
        return self.say("thread_running", tid, cpu)

    def leave(self, tid):
        self.seq[tid] += 1
        return self.say("thread_blocked", tid)

    def answer(self, decision, outcome=Outcome.COMMITTED):
        o = np.zeros(1, OUTCOME)
        tid, cpu = int(decision["tid"]), int(decision["cpu"])
        if outcome == Outcome.COMMITTED and tid >= 0:
            self.seq[tid] += 1
            self.cpu_seq[cpu] += 1
        o["version"], o["subsystem"], o["type"], o["time_ns"] = VERSION, SUBSYSTEM, Message.TXN_OUTCOME, self.now_ns
        o["tid"], o["cpu"], o["outcome"], o["txn"] = tid, cpu, outcome, decision["txn"]
        o["seq"], o["cpu_seq"] = self.seq[tid] if tid >= 0 else 0, self.cpu_seq[cpu]
        self.unsent.append(o.view(MESSAGE))
        return self

    def batch(self, now_ns=None):
        """The agent drains all that was said; its decisions."""
        self.now_ns = self.now_ns + 1_000 if now_ns is None else now_ns
        end = np.zeros(1, MESSAGE)
        end["version"], end["subsystem"], end["type"], end["time_ns"], end["tid"], end["cpu"] = (
            VERSION,
            SUBSYSTEM,
            Message.BATCH_END,
            self.now_ns,
            -1,
            -1,
        )
        messages, self.unsent = np.concatenate([*self.unsent, end]), []
        self.last = self.replayed.feed(messages)
        return self.last

    def run(self, tid, cpu):
        """Have `tid`, woken now, run on `cpu`, the only idle one."""
        [decision] = self.wake(tid).batch()
        assert (decision["tid"], decision["cpu"]) == (tid, cpu)
        self.answer(decision)
        assert len(self.batch()) == 0
        return self

    @property
    def runtime(self):
        return self.replayed.runtime[0]

    def state(self, name):
        return self.replayed.bound.state[name][0]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a policy of a queue, with handlers over its own; as plain Python, since it is the laws that are looked at."""
    monkeypatch.setenv("WAVE_JIT", "0")

    def policy(handlers="", options="", queue=QUEUE):
        path = tmp_path / "made.py"
        path.write_text(HEAD.format(options=options) + textwrap.indent(queue + textwrap.dedent(handlers), "    "))
        return load_policy(str(path))

    return policy


@pytest.fixture
def fifo():
    return load_policy("fifo")


def placed(decisions):
    return [(int(d["tid"]), int(d["cpu"])) for d in decisions if d["type"] == Decision.RUN]


def test_a_cpu_that_went_idle_early_is_served_when_a_thread_comes(fifo):
    host = Host(fifo)
    assert len(host.batch()) == 0
    assert len(host.batch()) == 0
    [decision] = host.wake(5).batch()
    assert (decision["type"], decision["tid"], decision["cpu"]) == (Decision.RUN, 5, 0)
    assert decision["flags"] & KICKED  # an idle CPU does not look by itself


def test_a_cpu_with_a_decision_on_its_way_is_not_asked_again(fifo):
    host = Host(fifo)
    assert placed(host.wake(1).batch()) == [(1, 0)]
    assert placed(host.wake(2).batch()) == [(2, 1)]
    assert placed(host.wake(3).batch()) == []


def test_a_cpu_that_was_not_introduced_gets_nothing(fifo):
    host = Host(fifo, present=False)
    host.say("cpu_idle", cpu=0).wake(1)
    assert len(host.batch()) == 0
    assert placed(host.say("cpu_new", cpu=0).batch()) == [(1, 0)]


def test_a_cpu_that_a_higher_class_took_gets_nothing_until_it_is_back(fifo):
    host = Host(fifo, cpus=1)
    host.say("cpu_taken", cpu=0).wake(1)
    assert len(host.batch()) == 0
    assert placed(host.say("cpu_back", cpu=0).say("cpu_idle", cpu=0).batch()) == [(1, 0)]


def test_a_decision_carries_the_threads_newest_sequence_number_and_the_state_it_was_made_on(fifo):
    host = Host(fifo, cpus=1)
    host.now_ns = 700
    [decision] = host.wake(3).batch(now_ns=900)
    assert (decision["seq"], decision["time_ns"], decision["decided_ns"], decision["version"]) == (1, 700, 900, VERSION)
    host.answer(decision).block(3, 0)
    host.batch()
    [again] = host.wake(3).batch()
    assert again["seq"] == host.seq[3] == 4
    assert again["txn"] > decision["txn"]


RETRIED = [each for each in Outcome if each not in (Outcome.COMMITTED, Outcome.CPU_UNAVAILABLE)]


@pytest.mark.parametrize("outcome", RETRIED, ids=lambda each: each.name)
def test_a_decision_that_failed_brings_its_thread_back_to_the_front(make, outcome):
    host = Host(make(), cpus=1)
    [decision] = host.wake(1).batch()
    host.wake(2, 3).answer(decision, outcome)
    [again] = host.batch()
    assert host.state("seen")[1] == 2  # front
    assert (again["tid"], again["cpu"]) == (1, 0)
    assert host.runtime["redelivered"] == 1


def test_txn_failed_stands_in_for_the_redelivery(make):
    host = Host(make("def txn_failed(self, msg, txns):\n    self.seen[msg.tid] = 100 + msg.outcome\n    push(self.runq, msg.tid)\n"), cpus=1)
    [decision] = host.wake(1).batch()
    [again] = host.wake(2).answer(decision, Outcome.CONGESTED).batch()
    assert host.state("seen")[1] == 100 + Outcome.CONGESTED
    assert again["tid"] == 2
    assert host.state("calls")[0] == 2


def test_an_outcome_that_news_of_its_thread_overtook_brings_nothing_back_twice(make):
    host = Host(make(), cpus=1)
    [decision] = host.wake(1).batch()
    host.wake(1).answer(decision, Outcome.STALE)
    [again] = host.batch()
    assert (again["tid"], again["seq"]) == (1, 2)
    assert host.state("calls")[0] == 2
    host.answer(again)
    assert len(host.batch()) == 0


def test_a_thread_that_is_told_twice_is_the_policys_once(make):
    host = Host(make(), cpus=1)
    host.run(9, 0).wake(1).wake(1)
    assert len(host.batch()) == 0
    assert host.state("calls")[0] == 2
    assert placed(host.block(9, 0).batch()) == [(1, 0)]


def test_a_thread_that_left_while_the_policy_held_it_is_dropped_and_the_next_one_runs(fifo):
    host = Host(fifo, cpus=1)
    host.run(9, 0).wake(1, 2)
    host.batch()
    host.say("thread_dead", 1)
    assert placed(host.block(9, 0).batch()) == [(2, 0)]
    assert host.runtime["dropped"] == 1


def test_a_thread_that_the_host_ran_undecided_runs_for_the_policy_too(make):
    host = Host(make("def thread_running(self, msg, txns):\n    sched.set_timer(txns, msg.cpu, msg.time_ns + 500)\n"), cpus=1)
    host.wake(1).run_undecided(1, 0)
    assert len(host.batch()) == 0
    assert host.runtime["cpu"][0]["running"] == 1
    assert host.runtime["cpu"][0]["timer_ns"] > 0
    assert placed(host.wake(2).batch()) == []
    assert placed(host.block(1, 0).batch()) == [(2, 0)]


def test_a_decision_that_the_host_overtook_brings_nothing_back(make):
    host = Host(make(), cpus=1)
    [decision] = host.wake(1).batch()
    host.run_undecided(1, 0).answer(decision, Outcome.STALE)
    assert len(host.batch()) == 0
    assert host.runtime["redelivered"] == 0


def test_a_thread_that_comes_back_while_the_policy_still_has_it_loses_its_place_from_before(fifo):
    host = Host(fifo, cpus=1)
    host.run(9, 0).wake(1, 2, 3)
    host.batch()
    host.block(9, 0, idle=False).run_undecided(1, 0).block(1, 0, idle=False).run_undecided(2, 0).wake(1)
    host.batch()
    assert placed(host.block(2, 0).batch()) == [(3, 0)]
    assert host.runtime["dropped"] == 2
    assert host.runtime["void"] == 0


def test_once_nothing_waits_the_policy_is_asked_for_those_that_have_left(make):
    host = Host(make(), cpus=1)
    for _ in range(3):
        host.wake(1).run_undecided(1, 0).block(1, 0, idle=False)
        assert len(host.batch()) == 0
    assert host.state("runq")["head"] == host.state("runq")["tail"]
    assert host.runtime["void"] == 0


def test_a_thread_has_at_most_a_few_places_at_once(make):
    host = Host(make(), cpus=1)
    host.run(9, 0).wake(2)
    for _ in range(10):
        host.wake(1)
        host.batch()
        host.leave(1)
    assert host.state("runq")["tail"] - host.state("runq")["head"] == 1 + MOST_VOID
    assert placed(host.wake(1).block(9, 0).batch()) == [(2, 0)]
    host.leave(2)
    assert placed(host.say("cpu_idle", cpu=0).batch()) == [(1, 0)]


def test_what_is_prestaged_waits_behind_a_busy_cpu_without_a_doorbell(fifo):
    host = Host(fifo, cpus=1, ahead=1)
    host.run(9, 0)
    [decision] = host.wake(1).batch()
    assert (decision["tid"], decision["flags"]) == (1, 0)
    assert placed(host.wake(2).batch()) == []  # no further ahead than told
    assert placed(host.block(9, 0, idle=False).answer(decision).batch()) == [(2, 0)]


def test_a_cpu_that_went_idle_before_an_unannounced_decision_came_is_kicked_once(fifo):
    host = Host(fifo, cpus=1, ahead=1)
    host.run(9, 0)
    [decision] = host.wake(1).batch()
    host.block(9, 0)
    [kick] = host.batch()
    assert (kick["type"], kick["cpu"], bool(kick["flags"] & KICKED)) == (Decision.KICK, 0, True)
    assert len(host.say("cpu_idle", cpu=0).batch()) == 0
    assert len(host.answer(decision).batch()) == 0


def test_a_thread_staged_behind_a_busy_cpu_is_decided_again_for_one_that_falls_idle_and_the_stale_copy_is_forgotten(fifo):
    host = Host(fifo, cpus=2, ahead=1)
    first, second = host.wake(8, 9).batch()
    host.answer(first).answer(second)
    host.batch()
    [staged] = host.wake(1).batch()
    busy = int(staged["cpu"])
    free = 1 - busy
    [copy] = host.block(8 if free == 0 else 9, free).batch()
    assert (copy["tid"], copy["cpu"], copy["seq"]) == (1, free, staged["seq"])
    assert host.runtime["restaged"] == 1
    host.answer(copy)
    host.batch()
    assert len(host.answer(staged, Outcome.STALE).batch()) == 0
    assert host.runtime["redelivered"] == 0
    assert host.runtime["live"] == host.runtime["waiting"] == 0


def test_the_stale_copy_of_a_restaged_thread_may_come_after_the_thread_ran_and_came_back(fifo):
    host = Host(fifo, cpus=2, ahead=1)
    first, second = host.wake(8, 9).batch()
    host.answer(first).answer(second)
    host.batch()
    [staged] = host.wake(1).batch()
    busy = int(staged["cpu"])
    [copy] = host.block(8 if busy == 1 else 9, 1 - busy).batch()
    host.answer(copy)
    host.batch()
    again = host.block(1, 1 - busy).wake(1).batch()
    assert placed(again) == [(1, 1 - busy)]
    assert len(host.answer(staged, Outcome.STALE).batch()) == 0
    assert len(host.answer(again[0]).batch()) == 0
    assert host.runtime["thread"]["state"][1] == 4  # running, and in nobody's hands
    assert host.runtime["waiting"] == 0


# ── CPUs that a higher class took ────────────────────────────────────────────────────────────────────────────────────

PREEMPTIVE = ["shinjuku", "edf", "srpt"]
LAST, FIRST, MIDDLE = ({"qos": qos, "deadline_ns": due_ns, "work_ns": due_ns} for qos, due_ns in ((0, 900_000), (2, 10_000), (1, 20_000)))
"""Hints of a thread that is less urgent than another, to whatever policy."""


def run_two(policy, first, second, **options):
    """Threads 8 and 9, with these hints, on the two CPUs of a host. Returns it, and where they are."""
    host = Host(policy, cpus=2, **options)
    made = host.wake(8, **first).wake(9, **second).batch()
    for decision in made:
        host.answer(decision)
    assert len(host.batch()) == 0
    where = {int(decision["tid"]): int(decision["cpu"]) for decision in made}
    return host, where[8], where[9]


@pytest.mark.parametrize("policy", PREEMPTIVE)
def test_a_preemption_on_its_way_to_a_cpu_that_is_taken_is_made_on_one_that_falls_idle(policy):
    host, busy, low = run_two(load_policy(policy), FIRST, LAST)
    [preemption] = host.wake(1, **MIDDLE).batch()
    assert (preemption["tid"], preemption["cpu"], preemption["flags"]) == (1, low, PREEMPT | KICKED)
    assert len(host.say("cpu_taken", 9, cpu=low).batch()) == 0
    [copy] = host.block(8, busy).batch()
    assert (copy["tid"], copy["cpu"], copy["flags"], copy["seq"]) == (1, busy, KICKED, preemption["seq"])
    host.answer(copy).batch()
    host.say("cpu_back", cpu=low).answer(preemption, Outcome.STALE)
    assert len(host.batch()) == 0
    assert host.runtime["waiting"] == host.runtime["live"] == 0
    assert placed(host.wake(2, **MIDDLE).block(9, low).batch()) == [(2, low)]


def test_a_preemption_ordered_on_a_taken_cpu_is_made_on_one_that_falls_idle(make):
    host, busy, low = run_two(make("def tick(self, msg, txns):\n    sched.run(txns, tid=pop(self.runq), cpu=msg.cpu, preempt=True)\n"), {}, {})
    host.say("cpu_taken", 9, cpu=low).wake(1)
    assert placed(host.say("tick", 9, cpu=low).batch()) == [(1, low)]
    assert placed(host.block(8, busy).batch()) == [(1, busy)]


def test_a_thread_given_to_an_idle_cpu_that_is_taken_goes_to_another_that_idles(fifo):
    host = Host(fifo, cpus=2)
    [first] = host.wake(1).batch()
    [copy] = host.say("cpu_taken", cpu=0).batch()
    assert (int(first["cpu"]), int(copy["tid"]), int(copy["cpu"])) == (0, 1, 1)


def test_a_thread_staged_on_a_cpu_that_is_taken_stays_there_if_the_policy_need_not_conserve_work(make):
    host = Host(make(options=", work_conserving=False"), cpus=2)
    assert placed(host.wake(1).batch()) == [(1, 0)]
    assert len(host.say("cpu_taken", cpu=0).batch()) == 0


@pytest.mark.parametrize("policy", PREEMPTIVE)
def test_a_policy_preempts_no_cpu_that_is_taken(policy):
    host, other, low = run_two(load_policy(policy), MIDDLE, LAST)
    host.say("cpu_taken", 9, cpu=low)
    assert placed(host.wake(1, **FIRST).batch()) == [(1, other)]


@pytest.mark.parametrize("policy", PREEMPTIVE)
def test_a_policy_preempts_a_cpu_again_that_is_back(policy):
    host, _, low = run_two(load_policy(policy), FIRST, LAST)
    host.say("cpu_taken", 9, cpu=low).batch()
    assert placed(host.say("cpu_back", cpu=low).wake(1, **MIDDLE).batch()) == [(1, low)]


@pytest.mark.parametrize("policy", PREEMPTIVE)
def test_a_policy_does_not_wait_for_a_cpu_that_was_taken_while_it_idled(policy):
    host = Host(load_policy(policy), cpus=2)
    [decision] = host.say("cpu_taken", cpu=0).wake(9, **LAST).batch()
    host.answer(decision).batch()
    assert placed(host.wake(1, **FIRST).batch()) == [(1, 1)]


# ── preemptions that do not come about ───────────────────────────────────────────────────────────────────────────────

BY_URGENCY = ["edf", "srpt"]
MS = 1_000_000
LATE, SOON, SOONER, NOW = ({"deadline_ns": due_ns, "work_ns": due_ns} for due_ns in (900 * MS, 20 * MS, 15 * MS, 10 * MS))
REFUSALS = [each for each in Outcome if each not in (Outcome.COMMITTED, Outcome.STALE)]


@pytest.mark.parametrize("policy", BY_URGENCY)
def test_a_preemption_that_came_to_a_changed_state_is_ordered_again_at_once(policy):
    host, _, low = run_two(load_policy(policy), NOW, LATE)
    [preemption] = host.wake(1, **SOON).batch()
    host.seq[1] += 1
    [again] = host.say("affinity_changed", 1, **SOON).answer(preemption, Outcome.STALE).batch()
    assert (again["tid"], again["cpu"], again["flags"], again["seq"]) == (1, low, PREEMPT | KICKED, host.seq[1])


@pytest.mark.parametrize("outcome", REFUSALS, ids=lambda each: each.name)
@pytest.mark.parametrize("policy", BY_URGENCY)
def test_a_preemption_that_the_host_refused_is_ordered_again_a_millisecond_later(policy, outcome):
    host, _, low = run_two(load_policy(policy), NOW, LATE)
    [preemption] = host.wake(1, **SOON).batch()
    ordered_ns = host.now_ns
    assert len(host.answer(preemption, outcome).batch()) == 0
    assert placed(host.batch(ordered_ns + MS)) == [(1, low)]


@pytest.mark.parametrize("policy", BY_URGENCY)
def test_a_cpu_that_refused_a_thread_is_at_once_preempted_for_a_more_urgent_one(policy):
    host, _, low = run_two(load_policy(policy), NOW, LATE)
    [preemption] = host.wake(1, **SOON).batch()
    assert len(host.answer(preemption, Outcome.CPU_UNAVAILABLE).batch()) == 0
    assert placed(host.wake(2, **SOONER).batch()) == [(2, low)]


@pytest.mark.parametrize("policy", BY_URGENCY)
def test_a_cpu_whose_preemptor_died_on_its_way_is_preempted_a_millisecond_later(policy):
    host, _, low = run_two(load_policy(policy), NOW, LATE)
    [preemption] = host.wake(1, **SOON).batch()
    ordered_ns = host.now_ns
    assert len(host.say("thread_dead", 1).answer(preemption, Outcome.TARGET_GONE).wake(2, **SOON).batch()) == 0
    assert placed(host.batch(ordered_ns + MS)) == [(2, low)]


@pytest.mark.parametrize("policy", BY_URGENCY)
def test_urgent_threads_that_no_cpu_takes_are_sent_to_each_once_a_millisecond(policy):
    host, *_ = run_two(load_policy(policy), LATE, LATE)
    host.wake(1, 2, **SOON)
    nowhere = dict.fromkeys((1, 2), -1)
    refused = [pair for _ in range(190) for pair in refuse(host, host.batch(host.now_ns + 10_000), nowhere)[0]]  # 1.9 ms
    assert host.runtime["waiting"] == 2
    assert sorted(cpu for _, cpu in refused) == [0, 0, 1, 1]


# ── threads that may not run everywhere ──────────────────────────────────────────────────────────────────────────────

CONSERVING = ["fifo", "round_robin", "shinjuku", "shinjuku_mq", "edf", "srpt", "mlfq"]


def refuse(host, made, bound):
    """Answer what no busy CPU keeps: threads in `bound` run on the CPU given there only. What was refused, and what was committed."""
    refused, done = [], []
    for decision in made:
        tid, cpu = int(decision["tid"]), int(decision["cpu"])
        if decision["type"] == Decision.RUN and decision["flags"] & KICKED:
            host.answer(decision, Outcome.COMMITTED if bound.get(tid, cpu) == cpu else Outcome.CPU_UNAVAILABLE)
            (done if bound.get(tid, cpu) == cpu else refused).append((tid, cpu))
    return refused, done


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("policy", CONSERVING)
def test_no_thread_waits_behind_one_that_may_not_use_the_idle_cpu(policy, ahead):
    host, idle, busy = run_two(load_policy(policy), FIRST, FIRST, ahead=ahead)
    host.wake(1, 2, **LAST).block(8, idle)
    refused, done = [], []
    for _ in range(1_000):
        for seen, new in zip((refused, done), refuse(host, host.batch(host.now_ns + 5), {1: busy}), strict=True):
            seen += new
    assert (2, idle) in done
    assert refused in ([], [(1, idle)])
    if not ahead:
        assert placed(host.block(9, busy).batch()) == [(1, busy)]
    assert (host.runtime["unserved"], host.runtime["waiting"]) == (0, 0)


def test_a_thread_that_a_cpu_refused_is_not_tried_there_again_until_some_time_has_passed(make):
    host = Host(make(), cpus=1)
    assert refuse(host, host.wake(1).batch(), {1: None}) == ([(1, 0)], [])
    first_ns = host.now_ns
    assert len(host.batch()) == len(host.batch()) == 0
    assert host.runtime["next_timer_ns"] == first_ns + REFUSED_NS  # when the agent looks again, though it hears nothing
    assert len(host.batch(first_ns + REFUSED_NS - 1)) == 0
    assert (host.runtime["unserved"], host.runtime["waiting"], host.runtime["redelivered"]) == (0, 1, 1)
    assert refuse(host, host.batch(first_ns + REFUSED_NS), {1: None}) == ([(1, 0)], [])
    assert len(host.batch()) == 0
    assert host.runtime["next_timer_ns"] == first_ns + 2 * REFUSED_NS


@pytest.mark.parametrize("news", ["affinity_changed", "another activation", "resync"])
def test_a_thread_that_a_cpu_refused_is_tried_there_again_after_news_of_it(make, news):
    host = Host(make(), cpus=1)
    refuse(host, host.wake(1).batch(), {1: None})
    assert len(host.batch()) == 0
    assert len(host.say("priority_changed", 1).batch()) == 0
    if news == "affinity_changed":
        host.say(news, 1)
    elif news == "another activation":
        host.leave(1).wake(1)
    else:
        host.say("resync").say("cpu_new", cpu=0).say("cpu_idle", cpu=0).say("thread_new", 1).say("thread_runnable", 1)
    assert placed(host.batch()) == [(1, 0)]


def test_threads_that_may_not_use_a_cpu_keep_their_order_and_their_place_before_others(make):
    host, idle, busy = run_two(make(), {}, {})
    bound = dict.fromkeys((1, 2, 3), busy)
    host.block(8, idle).wake(1, 2, 3, 4, 5)
    for _ in range(5):
        refuse(host, host.batch(), bound)
    assert host.runtime["cpu"][idle]["running"] == 4
    bound[6] = busy
    host.wake(6, 7).block(4, idle)
    for _ in range(5):
        refuse(host, host.batch(), bound)
    assert host.runtime["cpu"][idle]["running"] == 5
    host.block(5, idle)
    for _ in range(5):
        refuse(host, host.batch(), bound)
    assert host.runtime["cpu"][idle]["running"] == 7
    for running, tid in ((9, 1), (1, 2), (2, 3), (3, 6)):
        [decision] = host.block(running, busy).batch()
        assert (decision["tid"], decision["cpu"]) == (tid, busy)
        host.answer(decision).batch()
    assert host.runtime["dropped"] == 0


@pytest.mark.parametrize("policy", CONSERVING)
def test_a_thread_that_a_cpu_refuses_is_not_overtaken_by_its_equals_without_end(policy):
    host, refusing, other = run_two(load_policy(policy), LATE, LATE)
    running = {refusing: 8, other: 9}
    host.wake(1, 2, 3, 4, **LATE)
    for _ in range(20):
        for cpu in (refusing, other):
            host.block(running[cpu], cpu).wake(running[cpu], **LATE)
            for _ in range(3):
                for tid, at in refuse(host, host.batch(), {1: other})[1]:
                    running[at] = tid
            if running[other] == 1:
                return
    raise AssertionError("thread 1 waits for ever, though the CPU that it may use takes a thread at every turn")


def test_a_thread_staged_behind_a_busy_cpu_is_not_offered_to_one_that_refused_it(fifo):
    host, first, second = run_two(fifo, {}, {}, ahead=1)
    [staged] = host.wake(1).batch()
    busy, idle, running = (first, second, 9) if staged["cpu"] == first else (second, first, 8)
    host.block(running, idle)
    refused = [pair for _ in range(10) for pair in refuse(host, host.batch(), {1: busy})[0]]
    assert refused == [(1, idle)]
    host.answer(staged)
    assert len(host.batch()) == 0
    assert (host.runtime["waiting"], host.runtime["cpu"]["running"][busy]) == (0, 1)


def test_a_cpu_with_nothing_but_threads_that_it_refuses_is_offered_what_waits_behind_others(fifo):
    host = Host(fifo, cpus=3, ahead=1)
    bound = {5: 1, 6: 1}
    for tid in (7, 8, 9):
        refuse(host, host.wake(tid).batch(), {})
    host.batch()
    host.wake(5).block(7, 0)
    for _ in range(3):
        refuse(host, host.batch(), bound)
    host.wake(6, 2)
    for _ in range(9):
        refuse(host, host.batch(), bound)
    assert host.runtime["cpu"][0]["running"] == 2


def test_a_refusal_of_a_cpu_that_was_taken_says_nothing_of_the_thread(make):
    host = Host(make(), cpus=1)
    [decision] = host.wake(1).batch()
    host.say("cpu_taken", cpu=0).say("cpu_back", cpu=0).answer(decision, Outcome.CPU_UNAVAILABLE).say("cpu_idle", cpu=0)
    assert placed(host.batch()) == [(1, 0)]


def test_txn_failed_hears_of_a_thread_that_is_not_sent_to_a_cpu_again(make):
    failed = """
    def txn_failed(self, msg, txns):
        self.calls[0] += 1
        self.seen[msg.tid] = 100 + msg.outcome
        push(self.runq, msg.tid)
    """
    host = Host(make(failed), cpus=1)
    refuse(host, host.wake(1).batch(), {1: None})
    host.batch()
    assert host.state("seen")[1] == 100 + Outcome.CPU_UNAVAILABLE
    assert host.state("calls")[0] == 3  # woken, refused, named again
    assert host.state("runq")["tail"] - host.state("runq")["head"] == host.runtime["waiting"] == 1


def test_resync_forgets_everything_and_loses_nothing_that_the_replay_tells(make):
    host = Host(make(), cpus=2)
    host.wake(1, 2, 3, 4)
    host.batch()
    assert host.state("runq")["tail"] - host.state("runq")["head"] == 2
    host.say("resync")
    host.say("cpu_new", cpu=0).say("cpu_idle", cpu=0).say("cpu_new", 7, cpu=1)
    for tid in (2, 3, 4):
        host.say("thread_new", tid).say("thread_runnable", tid)
    assert placed(host.batch()) == [(2, 0)]
    assert [int(x) for x in host.state("seen")[:5]] == [0, 0, 1, 1, 1]
    assert placed(host.block(7, 1).batch()) == [(3, 1)]


def test_a_decision_that_was_outstanding_at_a_resync_may_still_commit(make):
    host = Host(make(), cpus=1)
    [old] = host.wake(1).batch()
    host.say("resync").say("cpu_new", cpu=0).say("cpu_idle", cpu=0).say("thread_new", 1).say("thread_runnable", 1)
    [new] = host.batch()
    host.answer(old)
    assert len(host.batch()) == 0
    assert len(host.answer(new, Outcome.STALE).batch()) == 0
    assert host.runtime["waiting"] == host.runtime["live"] == 0
    assert placed(host.wake(2).block(1, 0).batch()) == [(2, 0)]


def test_an_outcome_from_before_a_resync_loses_no_thread(make):
    host = Host(make(), cpus=1)
    [old] = host.wake(1).batch()
    host.say("resync").say("cpu_new", cpu=0).say("cpu_idle", cpu=0).say("thread_new", 1).say("thread_runnable", 1)
    [new] = host.batch()
    made = host.answer(old, Outcome.AGENT_LOST).batch()
    for decision in [new, *made]:
        outcome = Outcome.COMMITTED if decision["seq"] == host.seq[1] and decision["type"] == Decision.RUN else Outcome.STALE
        if decision["type"] == Decision.RUN:
            host.answer(decision, outcome)
    host.batch()
    assert host.runtime["cpu"]["running"][0] == 1
    assert host.runtime["waiting"] == 0


PREEMPTS = "def timer_expired(self, msg, txns):\n    sched.preempt(txns, msg.cpu)\n\ndef tick(self, msg, txns):\n    sched.preempt(txns, msg.cpu)\n"


def test_preempt_with_nothing_staged_asks_at_once_and_the_decision_replaces_what_runs(make):
    host = Host(make(PREEMPTS), cpus=1)
    host.run(9, 0).wake(1)
    assert len(host.batch()) == 0
    [decision] = host.say("tick", cpu=0).batch()
    assert (decision["type"], decision["tid"], decision["flags"]) == (Decision.RUN, 1, PREEMPT | KICKED)
    assert decision["cpu_seq"] == host.cpu_seq[0]
    assert len(host.say("tick", cpu=0).batch()) == 0  # one preemption at a time


def test_preempt_with_a_decision_staged_takes_the_running_thread_off(make):
    host = Host(make(PREEMPTS), cpus=1, ahead=1)
    host.run(9, 0)
    host.wake(1)
    [staged] = host.batch()
    [order] = host.say("tick", cpu=0).batch()
    assert (order["type"], order["tid"], order["flags"], order["cpu_seq"]) == (Decision.YIELD_CPU, -1, PREEMPT | KICKED, host.cpu_seq[0])
    host.answer(order)
    host.seq[9] += 1
    host.cpu_seq[0] += 1
    host.say("thread_preempted", 9, 0).answer(staged)
    assert placed(host.batch()) == [(9, 0)]


def test_preempt_in_favour_of_nobody_leaves_the_thread_where_it_is(make):
    host = Host(make(PREEMPTS), cpus=1)
    host.run(9, 0)
    assert len(host.say("tick", cpu=0).batch()) == 0
    assert len(host.wake(1).batch()) == 0


SLICES = """
def thread_running(self, msg, txns):
    sched.set_timer(txns, msg.cpu, msg.time_ns + 30_000)

def timer_expired(self, msg, txns):
    if {prefers}:
        sched.preempt(txns, msg.cpu)
"""


def staged_behind(policy):
    """Thread 9 runs, thread 1 is staged behind it."""
    host = Host(policy, cpus=1, ahead=1)
    host.run(9, 0)
    [staged] = host.wake(1).batch()
    assert (staged["tid"], staged["flags"]) == (1, 0)
    return host, staged


def test_a_thread_that_is_staged_behind_one_whose_time_is_over_is_seen_to_wait(make):
    host, staged = staged_behind(make(SLICES.format(prefers="size(self.runq)")))
    [order] = host.batch(host.now_ns + 30_000)
    assert (order["type"], order["tid"], order["flags"], order["cpu_seq"]) == (Decision.YIELD_CPU, -1, PREEMPT | KICKED, host.cpu_seq[0])
    host.answer(order)
    host.seq[9] += 1
    host.cpu_seq[0] += 1
    assert placed(host.say("thread_preempted", 9, 0).answer(staged).batch()) == [(9, 0)]
    assert host.runtime["thread"]["state"][1] == 4


def test_a_decision_that_the_policy_makes_again_is_not_sent_again(make):
    host, staged = staged_behind(make(SLICES.format(prefers="False")))
    for _ in range(3):
        assert len(host.batch(host.now_ns + 30_000)) == 0
    assert host.state("calls") == 3  # both as they woke, and once more when the time of the other was over
    assert (host.runtime["waiting"], host.runtime["live"], host.runtime["cpu"]["staged"][0]) == (0, 1, 1)
    assert len(host.block(9, 0, idle=False).answer(staged).batch()) == 0
    assert host.runtime["thread"]["state"][1] == 4


KEEPS = """
def thread_running(self, msg, txns):
    sched.set_timer(txns, msg.cpu, msg.time_ns + 30_000)

def timer_expired(self, msg, txns):
    self.seen[63] = 1

def cpu_idle(self, msg, txns):
    if size(self.runq) and not (msg.front and self.seen[63]):
        sched.run(txns, tid=pop(self.runq), cpu=msg.cpu)
"""


@pytest.mark.parametrize("moved", [0, 1])
def test_a_decision_that_was_taken_back_and_no_longer_holds_is_made_anew(make, moved):
    host, _ = staged_behind(make(KEEPS, queue=QUEUE.partition("def cpu_idle")[0]))
    assert len(host.batch(host.now_ns + 30_000)) == 0
    host.seq[1] += moved
    if moved:
        host.say("affinity_changed", 1)
    made = host.block(9, 0).batch()
    [told] = [(int(each["type"]), int(each["tid"]), int(each["seq"]), int(each["flags"])) for each in made]
    assert told == ((Decision.RUN, 1, host.seq[1], KICKED) if moved else (Decision.KICK, -1, 0, KICKED))


DEMOTES = "def tick(self, msg, txns):\n    sched.demote(txns, msg.cpu)\n"


def test_a_demotion_is_sent_for_what_runs_and_no_outcome_is_waited_for(make):
    host = Host(make(DEMOTES), cpus=1)
    assert len(host.say("tick", cpu=0).batch()) == 0  # nothing runs there
    host.run(9, 0)
    for _ in range(2):
        [order] = host.say("tick", cpu=0).batch()
        assert (order["type"], order["tid"], order["flags"], order["cpu_seq"]) == (Decision.DEMOTE, -1, PREEMPT | KICKED, host.cpu_seq[0])
    assert host.runtime["live"] == host.runtime["cpu"]["staged"][0] == host.runtime["cpu"]["ordered"][0] == 0


def make_way(host, tid, other, cpu=0):
    """The host gives `other`, which wakes, the CPU of `tid`."""
    host.wake(other)
    host.seq[tid] += 1
    host.cpu_seq[cpu] += 1
    return host.say("thread_preempted", tid, cpu).run_undecided(other, cpu)


def test_mlfq_demotes_a_thread_once_and_lets_the_host_do_the_rest():
    host = Host(load_policy("mlfq"), cpus=1)
    host.run(1, 0)
    [demotion] = host.batch(host.now_ns + 30_000)
    assert (demotion["type"], demotion["cpu"]) == (Decision.DEMOTE, 0)
    for other in (2, 3, 2):
        assert len(make_way(host, 1, other).batch()) == 0
        assert placed(host.block(other, 0).batch()) == [(1, 0)]
        host.answer(host.last[0])
        assert len(host.batch(host.now_ns + 1_000_000)) == 0
    host.block(1, 0)
    host.run(1, 0)
    assert [int(each["type"]) for each in host.batch(host.now_ns + 30_000)] == [Decision.DEMOTE]  # it has slept, and had its time again


def test_mlfq_preempts_where_a_demoted_thread_has_not_made_way():
    host = Host(load_policy("mlfq"), cpus=1)
    host.run(1, 0)
    host.batch(host.now_ns + 30_000)
    assert len(host.wake(2).batch()) == 0
    assert len(host.batch(host.now_ns + 90_000)) == 0
    [order] = host.batch(host.now_ns + 10_000)
    assert (order["type"], order["tid"], order["flags"]) == (Decision.RUN, 2, PREEMPT | KICKED)


def test_mlfq_takes_a_cpu_for_what_waits_when_it_demotes_and_runs_the_demoted_when_nobody_else_waits():
    host = Host(load_policy("mlfq"), cpus=1)
    host.run(1, 0)
    host.wake(2, 3).batch()
    demotion, order = host.batch(host.now_ns + 30_000)
    assert (demotion["type"], order["type"], order["tid"], order["flags"]) == (Decision.DEMOTE, Decision.RUN, 2, PREEMPT | KICKED)
    host.seq[1] += 1
    host.cpu_seq[0] += 1
    host.say("thread_preempted", 1, 0).answer(order).batch()
    assert placed(host.block(2, 0).batch()) == [(3, 0)]
    host.answer(host.last[0]).batch()
    assert placed(host.block(3, 0).batch()) == [(1, 0)]


def test_a_thread_that_a_policy_forgets_has_one_place_and_that_is_its_last():
    """It was demoted, waited, and the host ran it by itself; now it is fresh, and the first of those that are."""
    host = Host(load_policy("mlfq"), cpus=1)
    host.run(1, 0)
    host.batch(host.now_ns + 30_000)
    make_way(host, 1, 2).batch()
    host.block(2, 0, idle=False).run_undecided(1, 0).batch()
    host.block(1, 0).batch()
    host.run(9, 0)
    host.wake(1, 2).batch()
    assert placed(host.block(9, 0).batch()) == [(1, 0)]
    host.answer(host.last[0]).batch()
    assert placed(host.block(1, 0).batch()) == [(2, 0)]


IDLES = "def tick(self, msg, txns):\n    sched.preempt(txns, msg.cpu, idle=True)\n"


def test_preempt_that_may_leave_the_cpu_idle_takes_the_thread_off_though_none_waits(make):
    host = Host(make(IDLES), cpus=1)
    assert len(host.say("tick", cpu=0).batch()) == 0  # nothing runs there
    host.run(9, 0)
    [order] = host.say("tick", cpu=0).batch()
    assert (order["type"], order["tid"], order["flags"], order["cpu_seq"]) == (Decision.YIELD_CPU, -1, PREEMPT | KICKED, host.cpu_seq[0])
    assert len(host.say("tick", cpu=0).batch()) == 0  # one at a time
    host.answer(order)
    host.seq[9] += 1
    host.cpu_seq[0] += 1
    assert placed(host.say("thread_preempted", 9, 0).say("cpu_idle", cpu=0).batch()) == [(9, 0)]


def test_a_preemption_that_came_too_late_may_be_ordered_again(make):
    host = Host(make(PREEMPTS), cpus=1)
    host.run(9, 0).wake(1)
    [decision] = host.say("tick", cpu=0).batch()
    host.answer(decision, Outcome.STALE)
    assert len(host.batch()) == 0
    [again] = host.say("tick", cpu=0).batch()
    assert (again["tid"], again["flags"]) == (1, PREEMPT | KICKED)


TIMER = """
def thread_running(self, msg, txns):
    sched.set_timer(txns, msg.cpu, msg.time_ns + 10_000)

def timer_expired(self, msg, txns):
    self.seen[0] += 1
"""


def test_a_timer_expires_once_it_is_past_and_again_while_a_thread_waits(make):
    host = Host(make(TIMER), cpus=1)
    host.now_ns = 50_000
    [decision] = host.wake(9).batch(50_000)
    host.answer(decision)
    for now_ns, calls in ((55_000, 0), (59_999, 0), (60_000, 1), (61_000, 1), (62_000, 1)):
        host.batch(now_ns)
        assert host.state("seen")[0] == calls
    host.wake(1).batch(63_000)
    assert host.state("seen")[0] == 2
    host.batch(64_000)
    assert host.state("seen")[0] == 3


def test_a_timer_dies_with_the_run_it_was_set_for(make):
    host = Host(make(TIMER), cpus=1)
    [decision] = host.wake(9).batch(1_000)
    host.answer(decision).batch(2_000)
    host.block(9, 0).batch(3_000)
    host.batch(90_000)
    assert host.state("seen")[0] == 0


def test_decisions_for_a_full_cpu_come_back_as_congested_when_the_batch_ends(make):
    eager = make("def tick(self, msg, txns):\n    while size(self.runq):\n        sched.run(txns, tid=pop(self.runq), cpu=0)\n")
    host = Host(eager, cpus=1)
    host.run(9, 0).wake(*range(1, DEPTH + 3)).batch()
    made = host.say("tick", cpu=0).batch()
    assert placed(made) == [(tid, 0) for tid in range(1, DEPTH + 1)]
    assert [int(host.state("seen")[tid]) for tid in range(1, DEPTH + 3)] == [1] * DEPTH + [2, 2]
    assert host.runtime["waiting"] == 2


@pytest.mark.parametrize(
    ("order", "told"),
    [
        ("sched.run(txns, tid=20, cpu=msg.cpu)", "ran thread 20, which is gone or was never there; run only threads given by thread_runnable, each once"),
        ("sched.run(txns, tid=32, cpu=msg.cpu)", "ran thread 32; the enclave's threads are 0..31"),
        ("sched.run(txns, tid=-1, cpu=msg.cpu)", "ran thread -1; the enclave's threads are 0..31"),
        ("sched.run(txns, tid=1 << 40, cpu=msg.cpu)", "ran thread 1099511627776; the enclave's threads are 0..31"),
        ("sched.run(txns, tid=pop(self.runq), cpu=2)", "named CPU 2, which is outside the enclave (CPUs 0..1)"),
        ("sched.run(txns, tid=pop(self.runq), cpu=-1)", "named CPU -1, which is outside the enclave (CPUs 0..1)"),
        ("sched.preempt(txns, 7)", "named CPU 7, which is outside the enclave (CPUs 0..1)"),
        ("sched.set_timer(txns, 1 << 40, 5)", "named CPU 1099511627776, which is outside the enclave (CPUs 0..1)"),
        ("for _ in range(65): sched.preempt(txns, 0)", "too many orders from one handler call"),
        ("tid = pop(self.runq)\nsched.run(txns, tid=tid, cpu=0)\nsched.run(txns, tid=tid, cpu=1)", "ran thread 1, which is already staged"),
    ],
)  # fmt: skip
def test_what_no_policy_may_order_stops_it_with_one_clear_line(make, order, told):
    idle = "def cpu_idle(self, msg, txns):\n" + textwrap.indent(order, "    ")
    host = Host(make(idle, queue=QUEUE.partition("def cpu_idle")[0]))
    with pytest.raises(PolicyError) as error:
        host.wake(1).batch()
    assert told in str(error.value)
    assert str(error.value).startswith("policy 'made', cpu_idle at ")
    assert "\n" not in str(error.value)


def test_a_policy_that_failed_decides_nothing_any_more(make):
    host = Host(make("def tick(self, msg, txns):\n    sched.run(txns, tid=31, cpu=0)\n"))
    with pytest.raises(PolicyError):
        host.say("tick", cpu=0).batch()
    before = host.runtime.tobytes()
    with pytest.raises(PolicyError):
        host.wake(1).batch()
    assert host.runtime.tobytes() == before


def test_messages_about_what_is_not_the_enclaves_change_nothing(make):
    host = Host(make(), cpus=2)
    host.batch()
    host.say("thread_runnable", 32).say("thread_runnable", -2).say("thread_runnable", -1).say("cpu_idle", cpu=2).say("cpu_new", cpu=1 << 20)
    host.say("thread_blocked", 3, cpu=5).say("txn_outcome", 1, cpu=9).say("cpu_idle", cpu=-1)
    assert len(host.batch()) == 0
    assert host.state("calls")[0] == 0
    assert host.runtime["idle"] == 2


def test_without_messages_nothing_is_decided(fifo):
    host = Host(fifo)
    host.batch()
    assert [len(host.batch()) for _ in range(3)] == [0, 0, 0]


def test_a_stream_gives_the_same_decisions_in_any_cut(fifo):
    from waveos.testing import record_stream

    stream, decisions = record_stream(fifo, seed=4, steps=400)
    replayed = Replayed(fifo, 4, 32, 1)
    pieces = [replayed.feed(stream[at : at + 7]) for at in range(0, len(stream), 7)]
    assert np.concatenate([np.zeros(0, DECISION), *pieces]).tobytes() == decisions.tobytes()


# ── known weaknesses, each with its way out ──────────────────────────────────────────────────────────────────────────


def test_threads_returned_by_a_full_cpu_survive_a_handler_that_places_several(make):
    pushy = """
    def tick(self, msg, txns):
        while size(self.runq):
            sched.run(txns, tid=pop(self.runq), cpu=0)

    def txn_failed(self, msg, txns):
        push(self.runq, msg.tid)
        if size(self.runq) >= 3:
            while size(self.runq):
                sched.run(txns, tid=pop(self.runq), cpu=0)
    """
    host = Host(make(pushy), cpus=1)
    host.run(9, 0).wake(*range(1, DEPTH + 1)).batch()
    staged = host.say("tick", cpu=0).batch()
    assert len(staged) == DEPTH
    host.wake(10, 11, 12).say("tick", cpu=0).wake(13, 14)  # 10-12 find the CPU full; 13 and 14 wait in the queue
    host.batch()
    told = host.runtime["thread"]["state"]
    queue = host.state("runq")
    held = {int(queue["slot"][i % 64]) for i in range(int(queue["head"]), int(queue["tail"]))}
    on_the_list = {int(tid) for tid in host.runtime["returned_tid"][: int(host.runtime["returned"])]}
    assert {tid for tid in range(10, 15) if told[tid] in (2, 3)} <= held | on_the_list


def test_a_record_of_unknown_type_changes_nothing(make):
    host = Host(make(), cpus=1)
    host.run(9, 0)
    host.wake(1).batch()
    host.say(25, 1, seq=1_000)
    [decision] = host.block(9, 0).batch()
    assert decision["seq"] == host.seq[1]


def test_an_outcome_that_names_no_cpu_changes_nothing(make):
    host = Host(make(), cpus=1)
    host.batch()
    before = host.runtime["cpu"].tobytes()
    host.say("txn_outcome", 3, cpu=-1)
    host.batch()
    assert host.runtime["cpu"].tobytes() == before


def test_a_policy_that_declines_a_cpu_but_sets_a_timer_or_preempts_elsewhere_is_not_asked_again(make):
    declines = """
    def cpu_idle(self, msg, txns):
        self.calls[0] += 1
        if self.calls[0] > 100:
            raise RecursionError("asked 100 times in one batch")
        sched.set_timer(txns, msg.cpu, msg.time_ns + 10_000)
    """
    host = Host(make(declines, queue=QUEUE.partition("def cpu_idle")[0]))
    host.wake(1).batch()
    assert host.state("calls")[0] <= 10
