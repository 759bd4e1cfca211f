"""Linux's EEVDF on one CPU, all threads of one weight: virtual run times, lag that sleepers keep, eligibility, deadlines, and dequeues that are put off.

As in kernel/sched/fair.c of Linux 6.12 to 6.18, names as there. A thread is eligible while it has had no more than its share: its virtual run time is not
above the average of all that are queued. The eligible thread with the earliest deadline runs; the running one, while eligible, is protected until
its slice is over. A thread that sleeps while it has had too much stays in the queue until it would be eligible (delayed dequeue), and
one that sleeps otherwise is placed as far from the average when it wakes as it was when it went. Not modelled: weights, groups, other CPUs.
"""

from waveos import sched
from waveos.policy import Param, Policy, array, jitable, per_thread

MOST = 4_096  # threads in the queue


@jitable
def total(self):
    """Sum of the queued threads' virtual run times; the average is this over their number."""
    result = 0
    for i in range(self.n[0]):
        result += self.vruntime_ns[self.queue[i]]
    return result


@jitable
def eligible(self, tid):
    return total(self) >= self.n[0] * self.vruntime_ns[tid]


@jitable
def insert(self, tid):
    self.queue[self.n[0]] = tid
    self.n[0] += 1
    self.queued[tid] = 1


@jitable
def remove(self, tid):
    for i in range(self.n[0]):
        if self.queue[i] == tid:
            self.queue[i] = self.queue[self.n[0] - 1]
            self.n[0] -= 1
            self.queued[tid] = 0
            return


@jitable
def place(self, tid):
    """place_entity: at the average, less the lag; with nobody there lag means nothing."""
    n = self.n[0]
    average = self.last_ns[0] if n == 0 else total(self) // n
    lag = self.lag_ns[tid] * (n + 1) // n if n else 0
    self.vruntime_ns[tid] = average - lag
    self.deadline_ns[tid] = self.vruntime_ns[tid] + self.slice_us * 1_000


@jitable
def update_lag(self, tid):
    limit = max(2 * self.slice_us, self.tick_us) * 1_000
    self.lag_ns[tid] = min(limit, max(-limit, total(self) // self.n[0] - self.vruntime_ns[tid]))


@jitable
def dequeue(self, tid):
    update_lag(self, tid)
    self.last_ns[0] = self.vruntime_ns[tid]
    remove(self, tid)


@jitable
def update_current(self, now_ns):
    """update_curr: bring the running thread up to date; True if somebody else should be considered."""
    tid = self.running[0] - 1
    if tid < 0:
        return False
    ran = max(0, now_ns - self.since_ns[0])
    self.since_ns[0] += ran
    self.vruntime_ns[tid] += ran
    over = self.vruntime_ns[tid] >= self.deadline_ns[tid]
    if over:
        self.deadline_ns[tid] = self.vruntime_ns[tid] + self.slice_us * 1_000
    return self.n[0] > 1 and (over or self.vruntime_ns[tid] >= self.protected_ns[0])


@jitable
def pick(self, current):
    """__pick_eevdf: the eligible thread with the earliest deadline; the current one (-1: none) while it is eligible and protected."""
    if current >= 0 and eligible(self, current) and self.vruntime_ns[current] < self.protected_ns[0]:
        return current
    whole, best = total(self), -1
    for i in range(self.n[0]):
        tid = self.queue[i]
        if whole >= self.n[0] * self.vruntime_ns[tid] and (best < 0 or self.deadline_ns[tid] < self.deadline_ns[best]):
            best = tid
    return best


class Eevdf(Policy, subsystem=sched, name="eevdf"):
    """See the module."""

    slice_us: Param = 2_800
    tick_us: Param = 4_000

    queue = array(MOST)  # threads that are queued, the running one and delayed ones with them
    n = array(1)
    vruntime_ns = per_thread()
    deadline_ns = per_thread()
    lag_ns = per_thread()
    queued = per_thread()
    delayed = per_thread()
    running = array(1)  # tid + 1
    claimed = array(1)  # idle, but a thread is on its way
    since_ns = array(1)
    protected_ns = array(1)
    last_ns = array(1)  # virtual time when the queue fell empty

    def thread_runnable(self, msg, txns):
        tid = msg.tid
        if self.queued[tid] and self.delayed[tid] == 0:  # it was to run and could not
            self.claimed[0] = 0
            return
        if self.running[0] == 0 and self.claimed[0] == 0:
            if self.delayed[tid]:
                self.delayed[tid] = 0
                dequeue(self, tid)
                self.lag_ns[tid] = min(0, self.lag_ns[tid])
            place(self, tid)
            insert(self, tid)
            self.claimed[0] = 1
            sched.run(txns, tid=tid, cpu=0)
            return
        considered = update_current(self, msg.time_ns)
        if self.delayed[tid]:
            self.delayed[tid] = 0
            update_lag(self, tid)
            if self.lag_ns[tid] > 0:
                remove(self, tid)
                self.lag_ns[tid] = 0
                place(self, tid)
                insert(self, tid)
        else:
            place(self, tid)
            insert(self, tid)
        if self.running[0] and (considered or pick(self, self.running[0] - 1) == tid):
            sched.preempt(txns, 0)

    def thread_running(self, msg, txns):
        self.running[0], self.claimed[0] = msg.tid + 1, 0
        self.since_ns[0] = msg.time_ns
        self.protected_ns[0] = self.deadline_ns[msg.tid]
        sched.set_timer(txns, 0, next_tick(self, msg.time_ns))

    def timer_expired(self, msg, txns):
        if update_current(self, msg.time_ns):
            sched.preempt(txns, 0)
        sched.set_timer(txns, 0, next_tick(self, msg.time_ns))

    def thread_preempted(self, msg, txns):
        update_current(self, msg.time_ns)
        self.running[0] = 0

    def thread_blocked(self, msg, txns):
        update_current(self, msg.time_ns)
        self.running[0] = 0
        if eligible(self, msg.tid):
            dequeue(self, msg.tid)
        else:
            self.delayed[msg.tid] = 1

    def cpu_idle(self, msg, txns):
        while self.n[0] and self.claimed[0] == 0:
            tid = pick(self, self.running[0] - 1)
            if tid == self.running[0] - 1:  # it was considered anew, and goes on
                return
            if self.delayed[tid] == 0:
                self.claimed[0] = 1
                sched.run(txns, tid=tid, cpu=0)
                return
            self.delayed[tid] = 0
            dequeue(self, tid)
            self.lag_ns[tid] = min(0, self.lag_ns[tid])


@jitable
def next_tick(self, now_ns):
    """The timer tick after now."""
    tick_ns = max(1, int(self.tick_us * 1_000))
    return (now_ns // tick_ns + 1) * tick_ns
