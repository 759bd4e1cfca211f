"""What the runtime guarantees to every scheduling policy, as one pure function over a stream of records.

`feed` takes one message; a BATCH_END record says that the queue is drained and what the agent's clock reads. Decisions collect in `out`,
stamped with the thread's newest sequence number; the caller sends and clears them. The same function runs in the emulator, in the agent's polling loop
and in replay, so equal streams give equal decisions, byte for byte.

The laws:
- `cpu_idle` is level-triggered: after each batch it is asked for every idle CPU without an outstanding decision, while the policy holds a thread.
- With prestaging it is then asked for busy CPUs as well (`front=1`), up to `depth` decisions ahead. A thread staged behind a busy CPU is offered
  to one that falls idle: the same decision is made again there, and whichever copy the host meets second aborts as stale.
- A thread staged on a CPU that a higher class took is offered to one that falls idle in the same way: the host does nothing there until the CPU is back.
- A CPU that went idle while a decision was on its way to it unannounced is kicked: no wake-up is lost.
- A CPU has at most DEPTH decisions outstanding; one more is not sent, and fails as congested when the batch ends.
- `timer_expired` is called once the timer is past, and again after each batch in which a thread waits, until the timer is set anew. What was prestaged behind
  the thread whose timer it is comes back to the policy before, as thread_runnable with front=1, so that the policy sees who waits; the decision stands
  meanwhile, and is not sent again if the policy makes it again.
- A decision that was not committed brings its thread back as thread_runnable with front=1, unless the policy has `txn_failed`.
- A thread that a CPU refused as unavailable (it may not run there) is not sent there again until its sequence number moves on, its affinity changes, or
  10 ms have passed (REFUSED_NS). If the policy answers that CPU's `cpu_idle` with it nonetheless, the policy is asked for another, so that no thread waits
  behind it; then it comes back as above, before the next CPU is asked.
- A thread that left while the policy held it (the host ran it, it was bound elsewhere, it ended) is dropped silently when the policy runs it; a thread
  the policy does not hold is an error. If it comes back meanwhile it is offered again, and the policy then has it twice: the first that it runs is
  dropped, so that the place from before is not its place now. A policy that keeps threads otherwise than in queues forgets them in `thread_running` and
  `thread_blocked`; one that handles `thread_dead` takes the thread out of its queues there. Once nothing waits the policy is asked until it has named
  all that have left. None of this is done for a policy that says `forgets=True`: it takes out of its queues itself all that leave.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray

from waveos.errors import PolicyError
from waveos.jit import as_pointer, call_dispatch, jit, jit_inline, store_word
from waveos.outcome import Outcome
from waveos.policy.bind import Bound
from waveos.record import VERSION
from waveos.sched.orders import ORDER_DEMOTE, ORDER_IDLE, ORDER_PREEMPT, ORDER_RUN, ORDER_RUN_NOW, ORDER_TIMER, ORDERS
from waveos.sched.records import DECISION, KICKED, MAX_CPUS, MAX_THREADS, MESSAGE, PREEMPT, SUBSYSTEM, Decision, Message

DEPTH = 4
"""Most decisions outstanding on one CPU."""
OUT = 4_096
"""Decisions of one batch."""
NEVER = 1 << 62
MOST_VOID = 4
"""Places of a thread in a policy's queues at once; one more is not taken, and the thread has one of those."""
RETURNS = 256
"""Decisions of one batch that may find their CPU full."""
REFUSED_NS = 10_000_000
"""How long a CPU's refusal of a thread holds, if nothing is heard of the thread: it may have had another cause than the thread's affinity."""

# Compiled code compares plain integers.
(
    THREAD_NEW,
    THREAD_RUNNABLE,
    THREAD_RUNNING,
    THREAD_BLOCKED,
    THREAD_PREEMPTED,
    THREAD_YIELDED,
    THREAD_DEAD,
    CPU_NEW,
    CPU_IDLE,
    CPU_TAKEN,
    CPU_BACK,
    TICK,
    TIMER_EXPIRED,
    TXN_FAILED,
    AFFINITY_CHANGED,
    PRIORITY_CHANGED,
    TXN_OUTCOME,
    BATCH_END,
    RESYNC,
) = map(int, Message)
RUN, YIELD_CPU, KICK, DEMOTE = map(int, Decision)
COMMITTED, CONGESTED, CPU_UNAVAILABLE = int(Outcome.COMMITTED), int(Outcome.CONGESTED), int(Outcome.CPU_UNAVAILABLE)

# Where a thread is, as the newest message has it. WITHHELD: the policy ran it on a CPU that refuses it; its again once that CPU has been asked for.
ABSENT, BLOCKED, RUNNABLE, STAGED, RUNNING, WITHHELD = range(6)
# What the policy answered for a CPU. NONE_LEFT: it holds no thread that may run there.
DECLINED, PLACED, NONE_LEFT = range(3)
# What stopped a policy.
RAISED, NOT_ITS_THREAD, NOT_A_THREAD, NOT_A_CPU, CPU_FULL, TOO_MANY = range(1, 7)

THREAD = np.dtype(
    [
        ("seq", "i8"),
        ("deadline_ns", "i8"),
        ("work_ns", "i8"),
        ("ran_ns", "i8"),
        ("stands", "i8"),  # 1 + the sequence number with which a decision for it stands that it was taken back from
        ("cpu", "i4"),  # where it runs or is staged
        ("state", "u1"),
        ("void", "u1"),  # places it has in the policy's queues from times that it has left since
        ("request_class", "u1"),
        ("qos", "u1"),
    ],
    align=True,
)
CPU = np.dtype(
    [
        ("timer_ns", "i8"),  # 0: none
        ("seq", "u4"),
        ("running", "i4"),  # thread, -1: none
        ("staged", "i4"),  # decisions outstanding
        ("live", "i4"),  # of them, those not made again elsewhere: threads with state STAGED and this CPU
        ("staged_tid", "i4", (DEPTH,)),
        ("kicked", "u1"),  # its doorbell was rung, and no outcome has come since
        ("present", "u1"),
        ("idle", "u1"),  # says so itself
        ("taken", "u1"),  # by a higher class
        ("preempting", "u1"),  # the next decision for it replaces what runs
        ("expired", "u1"),  # timer_expired was called for this setting of the timer
        ("ordered", "u1"),  # a preemption is on its way
    ],
    align=True,
)
REFUSAL = np.dtype(
    [
        ("seq", "i8"),  # holds while this is the thread's sequence number,
        ("until_ns", "i8"),  # and until then
        ("since_ns", "i8"),  # when a CPU first refused the thread as of that number
        ("cpus", "u1", (MAX_CPUS // 8,)),  # a bit for each CPU that refused the thread
    ],
    align=True,
)

RUNTIME = np.dtype(
    [
        ("dispatch", "i8"),
        ("handlers", "i8"),  # bit t: the policy handles type t
        ("state_at", "i8"),  # addresses: of the policy's state,
        ("state_bytes", "i8"),
        ("initial_at", "i8"),  # of its first bytes as they were at first; the others were zero
        ("initial_bytes", "i8"),
        ("msg_at", "i8"),  # of what a handler is given,
        ("orders_at", "i8"),  # and of what it answers
        ("watch", "i8"),  # address of a word that shows which handler runs; 0: none
        ("cpus", "i8"),
        ("threads", "i8"),
        ("ahead", "i8"),  # decisions to prestage on a busy CPU; 0: none
        ("conserving", "i8"),
        ("forgets", "i8"),  # the policy takes threads that leave out of its queues itself
        ("now_ns", "i8"),  # the agent's clock at the last batch end
        ("basis_ns", "i8"),  # host time of the newest message
        ("txn", "i8"),  # decisions made so far
        ("waiting", "i8"),  # runnable threads in the policy's hands
        ("void", "i8"),  # all threads' void places
        ("made", "i8"),  # decisions in `out`
        ("failed", "i8"),
        ("failed_type", "i8"),
        ("failed_tid", "i8"),
        ("failed_cpu", "i8"),
        ("failed_time_ns", "i8"),
        ("dropped", "i8"),  # threads that left while the policy held them
        ("restaged", "i8"),  # staged threads offered to a CPU that fell idle
        ("redelivered", "i8"),  # threads that came back after a failed transaction
        ("unserved", "i8"),  # batches after which a CPU idled while the policy held a thread
        ("next_restage", "i8"),
        ("idle", "i8"),  # CPUs that say they are idle
        ("live", "i8"),  # decisions on their way, all CPUs
        ("preempting", "i8"),  # some CPU's next decision replaces what runs there
        ("next_timer_ns", "i8"),  # no timer that is not past is due before
        ("timers_past", "i8"),  # some timer may be past
        ("returned", "i8"),
        ("returned_tid", "i8", (RETURNS,)),  # threads whose decision found no room; offered again when the batch ends
        ("refused_until_ns", "i8"),  # no CPU's refusal holds from then on
        ("withheld", "i8"),
        ("msg", MESSAGE),  # what a handler is given
        ("orders", ORDERS),  # what it answers
        ("cpu", CPU, (MAX_CPUS,)),
        ("out", DECISION, (OUT,)),
        ("thread", THREAD, (MAX_THREADS,)),
        ("refusal", REFUSAL, (MAX_THREADS,)),
        ("withheld_tid", "i4", (MAX_THREADS,)),
    ],
    align=True,
)
"""The runtime of one enclave: its tables as the newest messages have them, and scratch. One block of memory, so that calls pass one pointer."""


def make_runtime(
    bound: Bound, *, cpus: int, threads: int = MAX_THREADS, ahead: int = 0, watch: int = 0, into: np.ndarray[Any, Any] | None = None
) -> Any:
    """A runtime, [1] RUNTIME, for `bound` over CPUs 0..cpus-1 and threads 0..threads-1, with `ahead` decisions prestaged; `into`: memory for it.

    A CPU exists once CPU_NEW has told so.
    """
    if not 1 <= cpus <= MAX_CPUS or not 1 <= threads <= MAX_THREADS or not 0 <= ahead < DEPTH:
        raise ValueError(f"cpus {cpus} of 1..{MAX_CPUS}, threads {threads} of 1..{MAX_THREADS}, ahead {ahead} of 0..{DEPTH - 1}")
    runtime = np.zeros(1, RUNTIME) if into is None else into
    runtime["dispatch"], runtime["handlers"], runtime["watch"] = bound.address, bound.handlers, watch
    runtime["state_at"], runtime["state_bytes"] = bound.state_address, bound.state.nbytes
    runtime["initial_at"], runtime["initial_bytes"] = bound.initial.ctypes.data, bound.initial.nbytes
    runtime["msg_at"], runtime["orders_at"] = runtime["msg"].ctypes.data, runtime["orders"].ctypes.data
    runtime["cpus"], runtime["threads"], runtime["ahead"], runtime["conserving"] = cpus, threads, ahead, bound.policy.work_conserving
    runtime["forgets"], runtime["cpu"]["running"], runtime["next_timer_ns"] = bound.policy.forgets, -1, NEVER
    return runtime


def failure(runtime: np.ndarray[Any, Any], bound: Bound) -> PolicyError:
    """What a runtime that stopped (`failed`) has to say, in one line."""
    head = runtime[0]
    name = bound.policy.name
    handler = Message(int(head["failed_type"])).name.lower() if head["failed_type"] else "batch end"
    place = f"policy {name!r}, {handler} at {int(head['failed_time_ns'])} ns"
    tid, cpu = int(head["failed_tid"]), int(head["failed_cpu"])
    match int(head["failed"]):
        case 1:
            return PolicyError(f"{place}: {bound.explain(runtime['msg'])}{_full_queue(bound)}")
        case 2:
            states = ("is gone or was never there", "is blocked", "waits", "is already staged", "is already running", "is already staged")
            state = states[int(runtime["thread"]["state"][0, tid])]
            return PolicyError(f"{place}: ran thread {tid}, which {state}; run only threads given by thread_runnable, each once")
        case 3:
            return PolicyError(f"{place}: ran thread {tid}; the enclave's threads are 0..{int(head['threads']) - 1}")
        case 4:
            return PolicyError(f"{place}: named CPU {cpu}, which is outside the enclave (CPUs 0..{int(head['cpus']) - 1})")
        case 5:
            return PolicyError(f"{place}: more than {RETURNS} decisions for CPUs that have {DEPTH} outstanding; answer cpu_idle with one")
        case _:
            return PolicyError(f"{place}: more than {OUT} decisions in one batch; a policy that floods is stopped")


def _full_queue(bound: Bound) -> str:
    """Names a declared ring or heap that is full."""
    for name, dtype in bound.policy.fields.items():
        base = dtype.subdtype[0] if dtype.subdtype else dtype
        if base.fields and "tail" in base.fields:
            queues = bound.state[name].reshape(-1)
            capacity = queues["slot"].shape[-1]
            if np.any(queues["tail"] - queues["head"] >= capacity):
                return f"; {name!r} holds {capacity} entries and is full: declare it as large as the thread pool"
    return ""


@jit
def _fail(rt: Any, code: int, tid: int, cpu: int) -> None:
    if rt.failed == 0:
        rt.failed, rt.failed_type, rt.failed_tid, rt.failed_cpu = code, rt.msg.type, tid, cpu
        rt.failed_time_ns = max(rt.basis_ns, rt.now_ns)


@jit_inline
def _emit(rt: Any, kind: int, tid: int, cpu: int, flags: int) -> None:
    if rt.made >= OUT:
        _fail(rt, TOO_MANY, tid, cpu)
        return
    d = rt.out[rt.made]
    d.mark, d.version, d.subsystem, d.type = 0, VERSION, SUBSYSTEM, kind
    d.seq = rt.thread[tid].seq if tid >= 0 else 0
    d.time_ns, d.decided_ns = rt.basis_ns, rt.now_ns
    d.tid, d.cpu, d.flags, d.cpu_seq, d.txn, d.spare = tid, cpu, flags, rt.cpu[cpu].seq, rt.txn, 0
    rt.txn += 1
    rt.made += 1


@jit
def _stands(rt: Any, tid: int, cpu: int, now: bool) -> Any:
    """Whether a decision that was sent before serves: it is the next of that CPU, which has only to be told if it is to come at once."""
    c, t = rt.cpu[cpu], rt.thread[tid]
    t.stands = 0
    if c.staged == 0 or c.staged_tid[0] != tid:
        return False
    c.live += 1
    rt.live += 1
    t.state, t.cpu = STAGED, cpu
    if (now or c.preempting) and c.running >= 0:
        c.preempting, c.ordered, c.kicked = 0, 1, 1
        _emit(rt, YIELD_CPU, -1, cpu, PREEMPT | KICKED)
    elif c.idle and not c.kicked:
        c.kicked = 1
        _emit(rt, KICK, -1, cpu, KICKED)
    return True


@jit_inline
def _stage(rt: Any, tid: int, cpu: int, now: bool) -> None:
    """Decide that `tid` runs next on `cpu`; `now`: in place of what runs there."""
    c, t = rt.cpu[cpu], rt.thread[tid]
    if t.stands == t.seq + 1 and _stands(rt, tid, cpu, now):
        return
    if c.staged >= DEPTH:
        if rt.returned >= RETURNS:
            _fail(rt, CPU_FULL, tid, cpu)
            return
        rt.returned_tid[rt.returned] = tid
        rt.returned += 1
        c.live += 1
        rt.live += 1
        t.state, t.cpu = STAGED, cpu
        return
    flags = 0
    if (now or c.preempting) and c.running >= 0:
        flags = PREEMPT | KICKED
        c.ordered = 1
    elif c.idle and not c.kicked:
        flags = KICKED
    if flags:
        c.kicked = 1
    c.preempting = 0
    c.staged_tid[c.staged] = tid
    c.staged += 1
    c.live += 1
    rt.live += 1
    t.state, t.cpu = STAGED, cpu
    _emit(rt, RUN, tid, cpu, flags)


@jit_inline
def _refuses(rt: Any, cpu: int, tid: int) -> Any:
    """Whether the CPU has refused the thread, and nothing is known to have changed since."""
    if rt.now_ns >= rt.refused_until_ns:
        return False
    r = rt.refusal[tid]
    return rt.now_ns < r.until_ns and r.seq == rt.thread[tid].seq and (r.cpus[cpu >> 3] >> (cpu & 7)) & 1 != 0


@jit
def _note_refusal(rt: Any, cpu: int, tid: int, seq: int) -> None:
    """The CPU refuses the thread as of `seq`. The policy is asked again when that is over, whatever is heard until then."""
    r = rt.refusal[tid]
    if r.seq != seq:
        r.since_ns = rt.now_ns
    if rt.now_ns >= r.until_ns or r.seq != seq:
        for i in range(len(r.cpus)):
            r.cpus[i] = 0
        r.seq, r.until_ns = seq, rt.now_ns + REFUSED_NS
        rt.refused_until_ns = r.until_ns
        rt.next_timer_ns = min(rt.next_timer_ns, r.until_ns)
    r.cpus[cpu >> 3] |= 1 << (cpu & 7)


@jit_inline
def _apply(rt: Any) -> None:
    """Carry out the orders of the handler that just returned."""
    orders = rt.orders
    for i in range(orders.n):
        op, tid, cpu = orders.op[i], orders.tid[i], orders.cpu[i]
        if cpu < 0 or cpu >= rt.cpus or not rt.cpu[cpu].present:
            _fail(rt, NOT_A_CPU, tid, cpu)
            return
        c = rt.cpu[cpu]
        if op == ORDER_RUN or op == ORDER_RUN_NOW:
            if tid < 0 or tid >= rt.threads:
                _fail(rt, NOT_A_THREAD, tid, cpu)
                return
            t = rt.thread[tid]
            if t.void:
                t.void -= 1
                rt.void -= 1
                rt.dropped += 1
            elif t.state != RUNNABLE:
                _fail(rt, NOT_ITS_THREAD, tid, cpu)
                return
            else:
                rt.waiting -= 1
                if _refuses(rt, cpu, tid) and rt.msg.type == CPU_IDLE:
                    t.state = WITHHELD
                    rt.withheld_tid[rt.withheld] = tid
                    rt.withheld += 1
                else:
                    _stage(rt, tid, cpu, op == ORDER_RUN_NOW)
        elif op == ORDER_PREEMPT or op == ORDER_IDLE:
            if c.running >= 0 and not c.ordered:
                if c.live or op == ORDER_IDLE:
                    c.ordered = c.kicked = 1
                    _emit(rt, YIELD_CPU, -1, cpu, PREEMPT | KICKED)
                else:
                    c.preempting = rt.preempting = 1
        elif op == ORDER_DEMOTE:
            if c.running >= 0:
                _emit(rt, DEMOTE, -1, cpu, PREEMPT | KICKED)
        elif op == ORDER_TIMER:
            c.timer_ns, c.expired = 0, 0
            if orders.at_ns[i]:  # in the future, or a timer set to now from timer_expired would stop time
                c.timer_ns = max(orders.at_ns[i], rt.now_ns + 1)
                rt.next_timer_ns = min(rt.next_timer_ns, c.timer_ns)


@jit_inline
def _deliver(rt: Any, kind: int, tid: int, cpu: int, front: int, outcome: int, time_ns: int) -> None:
    """Call the policy's handler for `kind`, if it has one, and carry out what it orders."""
    if rt.failed or not (rt.handlers >> kind) & 1:
        return
    m = rt.msg
    m.version, m.subsystem, m.type = VERSION, SUBSYSTEM, kind
    m.time_ns, m.tid, m.cpu, m.front, m.outcome = time_ns, tid, cpu, front, outcome
    m.cpu_seq = rt.cpu[cpu].seq if cpu >= 0 else 0
    if tid >= 0:
        t = rt.thread[tid]
        m.seq, m.request_class, m.qos, m.deadline_ns, m.work_ns, m.ran_ns = t.seq, t.request_class, t.qos, t.deadline_ns, t.work_ns, t.ran_ns
    else:
        m.seq, m.request_class, m.qos, m.deadline_ns, m.work_ns, m.ran_ns = 0, 0, 0, 0, 0, 0
    rt.orders.n = 0
    store_word(rt.watch, kind)
    raised = call_dispatch(rt.dispatch, rt.state_at, rt.msg_at, rt.orders_at)
    store_word(rt.watch, 0)
    if raised:
        _fail(rt, RAISED, tid, cpu)
    else:
        _apply(rt)


@jit_inline
def _offer(rt: Any, tid: int, cpu: int, kind: int, front: int, outcome: int, time_ns: int) -> None:
    """Put a runnable thread into the policy's hands, once."""
    t = rt.thread[tid]
    if t.state != RUNNABLE:
        if t.state == STAGED:
            rt.cpu[t.cpu].live -= 1
            rt.live -= 1
        t.state = RUNNABLE
        rt.waiting += 1
        if t.void == MOST_VOID:
            t.void -= 1
            rt.void -= 1
            return
        if not (rt.handlers >> kind) & 1:
            kind = THREAD_RUNNABLE
        _deliver(rt, kind, tid, cpu, front, outcome, time_ns)


@jit_inline
def _set_idle(rt: Any, cpu: int, idle: int) -> None:
    """The CPU says that it is idle, or that it no longer is."""
    c = rt.cpu[cpu]
    rt.idle += idle - c.idle
    c.idle = idle


@jit_inline
def _leave(rt: Any, tid: int, state: int) -> None:
    """The thread no longer waits for the policy."""
    t = rt.thread[tid]
    if t.state == RUNNABLE:
        rt.waiting -= 1
        if not rt.forgets:
            t.void += 1
            rt.void += 1
    elif t.state == STAGED:
        rt.cpu[t.cpu].live -= 1
        rt.live -= 1
    t.state = state


@jit_inline
def _vacate(rt: Any, tid: int, cpu: int, cpu_seq: int) -> None:
    """The thread no longer runs on the CPU."""
    if cpu >= 0 and rt.cpu[cpu].running == tid:
        c = rt.cpu[cpu]
        c.running, c.timer_ns, c.ordered, c.preempting, c.seq = -1, 0, 0, 0, cpu_seq


@jit_inline
def _run(rt: Any, tid: int, cpu: int, m: Any) -> None:
    """The thread is on the CPU."""
    c, t = rt.cpu[cpu], rt.thread[tid]
    _leave(rt, tid, RUNNING)
    t.seq, t.cpu = m.seq, cpu
    c.running, c.seq, c.ordered, c.preempting, c.timer_ns = tid, m.cpu_seq, 0, 0, 0
    _set_idle(rt, cpu, 0)
    _deliver(rt, THREAD_RUNNING, tid, cpu, 0, 0, m.time_ns)


@jit_inline
def _settle_outcome(rt: Any, m: Any) -> None:
    """One outcome."""
    tid, cpu, outcome = int(m.tid), int(m.cpu), int(m.outcome)
    c = rt.cpu[cpu]
    c.kicked = 0
    if tid < 0:  # of a YIELD_CPU
        if outcome != COMMITTED:
            c.ordered = 0
        return
    found = False
    for i in range(c.staged):
        if found:
            c.staged_tid[i - 1] = c.staged_tid[i]
        elif c.staged_tid[i] == tid:
            found = True
    c.staged -= found
    t = rt.thread[tid]
    if outcome == COMMITTED:
        _run(rt, tid, cpu, m)
    else:
        c.ordered = 0
        if outcome == CPU_UNAVAILABLE and not c.taken and (c.idle or c.running >= 0):  # else it may not have been the enclave's just then
            _note_refusal(rt, cpu, tid, m.seq)
        if t.state == STAGED and t.cpu == cpu:  # else: another copy of the decision, or news of the thread, came first
            rt.redelivered += 1
            _offer(rt, tid, cpu, TXN_FAILED, 1, outcome, m.time_ns)


@jit
def _reset(rt: Any) -> None:
    """Forget everything: the host's state follows."""
    state = carray(as_pointer(rt.state_at), rt.state_bytes, np.uint8)
    state[:] = 0
    state[: rt.initial_bytes] = carray(as_pointer(rt.initial_at), rt.initial_bytes, np.uint8)
    for tid in range(rt.threads):
        t = rt.thread[tid]
        t.state, t.void = ABSENT, 0
        if rt.refused_until_ns:
            rt.refusal[tid].until_ns = 0
    for cpu in range(rt.cpus):
        c = rt.cpu[cpu]
        c.timer_ns, c.running, c.staged, c.live, c.kicked, c.present, c.idle, c.taken, c.preempting, c.ordered = 0, -1, 0, 0, 0, 0, 0, 0, 0, 0
    rt.waiting = rt.void = rt.returned = rt.idle = rt.live = rt.preempting = rt.made = rt.refused_until_ns = 0


@jit
def _hand_back(rt: Any, cpu: int) -> None:
    """The policy has been asked for `cpu`: threads that may not run there are its again, in front of others, the one refused for longest first.

    In that order, not in the one in which they were named: what was refused just now came back in front of those that had been before.
    """
    order = rt.withheld_tid
    for i in range(1, rt.withheld):
        tid, at = order[i], i
        while at > 0 and rt.refusal[order[at - 1]].since_ns > rt.refusal[tid].since_ns:
            order[at] = order[at - 1]
            at -= 1
        order[at] = tid
    while rt.withheld:
        rt.withheld -= 1
        _offer(rt, int(order[rt.withheld]), cpu, TXN_FAILED, 1, CPU_UNAVAILABLE, rt.now_ns)


@jit_inline
def _ask(rt: Any, cpu: int, ahead: int) -> Any:
    """Ask the policy for a thread for `cpu`: PLACED, DECLINED or NONE_LEFT."""
    c = rt.cpu[cpu]
    before, answer = c.staged, NONE_LEFT
    while rt.waiting > 0 and not rt.failed:
        passed = rt.dropped + rt.withheld
        _deliver(rt, CPU_IDLE, -1, cpu, ahead, 0, rt.now_ns)
        if c.staged != before:
            answer = PLACED
            break
        if rt.dropped + rt.withheld == passed:  # else the thread that it chose had left meanwhile, or may not run there
            answer = DECLINED
            break
    if rt.withheld:
        _hand_back(rt, cpu)
    return answer


@jit
def _clear(rt: Any) -> None:
    """Nothing waits, but the policy's queues name threads that have left: have it name them."""
    for cpu in range(rt.cpus):
        c = rt.cpu[cpu]
        while c.present and rt.void and not rt.failed:
            dropped = rt.dropped
            _deliver(rt, CPU_IDLE, -1, cpu, c.running >= 0, 0, rt.now_ns)
            if rt.dropped == dropped:
                break


@jit
def _last_live(rt: Any, cpu: int, to: int) -> Any:
    """The thread staged last on `cpu`, not elsewhere since, that CPU `to` does not refuse; -1: none."""
    c = rt.cpu[cpu]
    for i in range(c.staged - 1, -1, -1):
        tid = int(c.staged_tid[i])
        t = rt.thread[tid]
        if t.state == STAGED and t.cpu == cpu and not _refuses(rt, to, tid):
            return tid
    return -1


@jit
def _restage(rt: Any, cpu: int) -> None:
    """Offer a thread that is staged behind a busy CPU, or on one that is taken, to `cpu`, which is idle: decide it again there."""
    for i in range(rt.cpus):
        other = (rt.next_restage + i) % rt.cpus
        o = rt.cpu[other]
        if o.live and (o.taken or (o.running >= 0 and not o.ordered)):
            tid = _last_live(rt, other, cpu)
            if tid >= 0:
                rt.restaged += 1
                rt.next_restage = other + 1
                o.live -= 1
                rt.live -= 1
                _stage(rt, tid, cpu, False)
                return


@jit
def _take_back(rt: Any, cpu: int) -> None:
    """Threads staged behind the one that runs are the policy's again, in their order."""
    c = rt.cpu[cpu]
    for i in range(c.staged - 1, -1, -1):
        tid = int(c.staged_tid[i])
        t = rt.thread[tid]
        if t.state == STAGED and t.cpu == cpu:
            t.stands = t.seq + 1
            _offer(rt, tid, cpu, THREAD_RUNNABLE, 1, 0, rt.now_ns)


@jit
def _expire_timers(rt: Any) -> None:
    """Call timer_expired for every CPU whose timer is past, and find the next that will be."""
    rt.next_timer_ns, rt.timers_past = (rt.refused_until_ns if rt.now_ns < rt.refused_until_ns else NEVER), 0
    for cpu in range(rt.cpus):
        c = rt.cpu[cpu]
        if c.timer_ns and c.running >= 0:
            if c.timer_ns <= rt.now_ns and not c.ordered and (rt.waiting or not c.expired):
                if c.live and not c.expired:
                    _take_back(rt, cpu)
                c.expired = 1
                _deliver(rt, TIMER_EXPIRED, int(c.running), cpu, 0, 0, rt.now_ns)
            if c.timer_ns <= rt.now_ns:
                rt.timers_past = 1
            else:
                rt.next_timer_ns = min(rt.next_timer_ns, c.timer_ns)


@jit_inline
def _serve_idle(rt: Any) -> None:
    """Ask for every CPU that is idle with nothing on its way, or whose thread is to be replaced."""
    rt.preempting = 0
    declined = False
    for cpu in range(rt.cpus):
        c = rt.cpu[cpu]
        if not c.present or c.taken:
            continue
        if c.preempting and rt.waiting:
            _ask(rt, cpu, 0)
        c.preempting = 0
        if c.idle:
            if c.live == 0:
                answer = _ask(rt, cpu, 0)
                declined |= answer == DECLINED
                if (rt.waiting == 0 or answer == NONE_LEFT) and rt.live and c.live == 0 and rt.conserving:
                    _restage(rt, cpu)
            elif not c.kicked:
                c.kicked = 1
                _emit(rt, KICK, -1, cpu, KICKED)
    if declined and rt.waiting and rt.conserving:
        rt.unserved += 1


@jit_inline
def _settle_batch(rt: Any, now_ns: int) -> None:
    """The level-triggered part, after a drained batch."""
    rt.now_ns = max(rt.now_ns, now_ns)
    returned = rt.returned
    for i in range(returned):  # handlers that are called here may return more, behind these
        tid = int(rt.returned_tid[i])
        if rt.thread[tid].state == STAGED:
            _offer(rt, tid, int(rt.thread[tid].cpu), TXN_FAILED, 1, CONGESTED, rt.now_ns)
    for i in range(returned, rt.returned):
        rt.returned_tid[i - returned] = rt.returned_tid[i]
    rt.returned -= returned
    if (rt.timers_past and rt.waiting) or rt.next_timer_ns <= rt.now_ns:
        _expire_timers(rt)
    if rt.preempting or (rt.idle and (rt.waiting or rt.live)):
        _serve_idle(rt)
    if rt.ahead and rt.waiting:
        for cpu in range(rt.cpus):
            c = rt.cpu[cpu]
            if c.running >= 0 and not c.taken and c.live < rt.ahead and c.staged < DEPTH - 1:
                _ask(rt, cpu, 1)
                if rt.waiting == 0:
                    break
    if rt.void and rt.waiting == 0:
        _clear(rt)


@jit
def feed(rt: Any, m: Any) -> Any:
    """Take one record of the host's stream, or a BATCH_END. Returns False once the policy has failed; then nothing changes any more."""
    if rt.failed:
        return False
    kind = int(m.type)
    if kind == BATCH_END:
        _settle_batch(rt, m.time_ns)
        return rt.failed == 0
    rt.basis_ns = max(rt.basis_ns, m.time_ns)
    tid, cpu, front = int(m.tid), int(m.cpu), int(m.front)
    if kind == RESYNC:
        _reset(rt)
        return True
    if cpu >= rt.cpus or tid >= rt.threads or cpu < -1 or tid < -1:
        return True  # not of this enclave; the host's half refuses such things, and so does this one
    if kind == TXN_OUTCOME:
        if cpu >= 0:
            _settle_outcome(rt, m)
    elif kind in (THREAD_NEW, THREAD_RUNNABLE, THREAD_BLOCKED, THREAD_PREEMPTED, THREAD_YIELDED, THREAD_DEAD, AFFINITY_CHANGED, PRIORITY_CHANGED):
        if tid < 0:
            return True
        t = rt.thread[tid]
        t.seq, t.request_class, t.qos = m.seq, m.request_class, m.qos
        t.deadline_ns, t.work_ns, t.ran_ns = m.deadline_ns, m.work_ns, m.ran_ns
        if kind == THREAD_RUNNABLE:
            _offer(rt, tid, cpu, kind, front, 0, m.time_ns)
        elif kind == THREAD_PREEMPTED or kind == THREAD_YIELDED:
            _vacate(rt, tid, cpu, m.cpu_seq)
            _offer(rt, tid, cpu, kind, front, 0, m.time_ns)
        elif kind == THREAD_BLOCKED:
            _vacate(rt, tid, cpu, m.cpu_seq)
            _leave(rt, tid, BLOCKED)
            _deliver(rt, kind, tid, cpu, 0, 0, m.time_ns)
        elif kind == THREAD_DEAD:
            _vacate(rt, tid, cpu, m.cpu_seq)
            _leave(rt, tid, ABSENT)
            if (rt.handlers >> THREAD_DEAD) & 1:
                rt.void -= t.void
                t.void = 0
            _deliver(rt, kind, tid, cpu, 0, 0, m.time_ns)
        else:
            if kind == THREAD_NEW:
                _leave(rt, tid, BLOCKED)
            if kind != PRIORITY_CHANGED and rt.refused_until_ns:
                rt.refusal[tid].until_ns = 0
            _deliver(rt, kind, tid, cpu, front, 0, m.time_ns)
    elif cpu >= 0:
        c = rt.cpu[cpu]
        if kind == THREAD_RUNNING and tid >= 0:  # the host ran it while no decision was there
            _run(rt, tid, cpu, m)
        elif kind == CPU_NEW:
            c.present, c.seq, c.running = 1, m.cpu_seq, tid
            if tid >= 0:
                _leave(rt, tid, RUNNING)
                rt.thread[tid].cpu = cpu
            _deliver(rt, kind, tid, cpu, 0, 0, m.time_ns)
            if tid >= 0:
                _deliver(rt, THREAD_RUNNING, tid, cpu, 0, 0, m.time_ns)
        elif kind == CPU_IDLE:
            c.running, c.seq = -1, m.cpu_seq
            _set_idle(rt, cpu, 1)
        elif kind == CPU_TAKEN:
            c.taken, c.kicked = 1, 0
            _set_idle(rt, cpu, 0)
            _deliver(rt, kind, tid, cpu, 0, 0, m.time_ns)
        elif kind == CPU_BACK:
            c.taken = 0
            _deliver(rt, kind, tid, cpu, 0, 0, m.time_ns)
        elif kind == TICK:
            _deliver(rt, kind, tid, cpu, 0, 0, m.time_ns)
    return rt.failed == 0


@jit
def feed_all(runtime: Any, messages: Any, first: int, out: Any) -> Any:
    """Feed `messages[first:]` until all are taken, the policy fails, or `out` cannot hold one more batch. Returns (messages taken, decisions written).

    runtime: [1] RUNTIME; messages: [n] MESSAGE; out: [m] DECISION.
    """
    rt = runtime[0]
    n, written = first, 0
    while n < messages.shape[0]:
        ok = feed(rt, messages[n])
        n += 1
        for i in range(rt.made):
            out[written] = rt.out[i]
            written += 1
        rt.made = 0
        if not ok or written + OUT > out.shape[0]:
            break
    return n, written
