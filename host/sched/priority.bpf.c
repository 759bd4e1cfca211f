/* Mechanism `priority`, the kernel's side: messages from tracepoints, and decisions that agree with what the kernel does anyway.
 *
 * The enclave's threads are SCHED_FIFO of one priority, so the kernel runs them in the order in which they became runnable, with or without an agent.
 * When it puts a thread on a CPU and the decision at the head of that CPU's queue names the same thread, the decision is committed here, at no cost.
 * When nothing is decided for that CPU, what the kernel does holds, and the agent is told (THREAD_RUNNING): its policy may still preempt the thread.
 * When a decision names another (the policy has an order of its own), or a preemption is asked for, hostd is woken; it moves a thread to the head or the
 * tail of the kernel's queue by raising or lowering its priority for a moment. Nothing here changes who runs.
 *
 * A thread that is demoted has the next lower priority until it has slept, so that it makes way for whoever wakes by the kernel's own rule. hostd is needed
 * twice: to lower it, and to raise it again, which is in time when it wakes.
 *
 * A thread that runs in another's stead (a stray) is left alone for its first grace_ns: most are done by then, and an agent that is a little late would
 * have hostd take the CPU for longer than they do. A timer ends the grace; where all others wait for the stray nothing else would.
 */
#include "wave.bpf.h"

u64 grace_ns = 50000; /* set by hostd */

#define TASK_DEAD 0x80 /* linux/sched.h */

/* A decision is given up whose thread the kernel has so often left aside, though hostd had moved it to the head of the queue: it cannot run. It has gone to
 * sleep on a CPU outside the enclave, say, where nobody looks. Without an end to it hostd and the thread that runs instead would take turns for good. */
#define TRIES 3
#define ORDERED (1u << 15) /* in a staged decision's flags: hostd was told to move its thread, */
#define TRY (1u << 16)     /* and, counted from this bit on, how often that was of no use */

/* What hostd is to do, in order. */
enum act_type { ACT_TAIL = 1, ACT_HEAD, ACT_LEVEL };
#define ACT_LOW 4 /* and the thread's own level is then the lower one */
struct act {
	u32 type;
	u32 pid;
	u32 cpu; /* the kernel's */
	s32 tid;
};
#define ACTS (4 * CPUS) /* at most two a CPU, and one for each that was demoted */
struct acts {
	u64 n;
	struct act act[ACTS];
};
struct acts acts SEC(".bss.acts");

/* Threads that hostd has lowered. Where they find no room nobody is demoted. */
struct {
	u64 n;
	u64 kept; /* while the list is gone through; in memory, where the verifier does not follow it */
	s32 tid[CPUS];
} lowered SEC(".bss.lowered");

struct alarm {
	struct bpf_timer timer;
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, CPUS);
	__type(key, u32);
	__type(value, struct alarm);
} alarms SEC(".maps"); /* when a CPU's stray is looked at again */

/* The stray of a CPU has run for longer than is let pass. */
static __always_inline bool lingers(struct cpu *c, u64 now)
{
	struct thread *t = thread_at(c->stray);

	return t->ran_ns + (now - t->since_ns) >= grace_ns;
}

/* The decision is for a demoted thread, and one that is not demoted runs: that is what demotion is for. */
static __always_inline bool overtaken(struct decision *d, struct cpu *c)
{
	return thread_at(d->tid)->demoted && !thread_at(c->stray)->demoted;
}

/* A thread that no decision put there is on the CPU: is it what was decided? True if hostd must step in. */
static __always_inline bool compare(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	struct decision *d;

	if (c->running >= 0 || c->stray < 0)
		return false;
	d = first(cpu, now);
	if (!d || overtaken(d, c)) {
		accept(c->stray, cpu, now);
		return false;
	}
	if (d->tid == c->stray) {
		commit(d, cpu, now);
		return false;
	}
	if (c->deviates || !lingers(c, now))
		return false;
	c->deviates = 1;
	host.deviations++;
	return true;
}

/* Another member than the decided one came onto the CPU: had hostd moved that one, it was of no use. */
static __always_inline void count_try(u32 cpu, s32 tid)
{
	struct cpu *c = cpu_at(cpu);
	struct decision *d = head_of(c);

	if (c->staged && d->flags & ORDERED && d->tid != tid && !thread_at(d->tid)->demoted) {
		d->flags &= ~ORDERED;
		d->flags += TRY;
	}
}

/* The thread of the decision at the head of the queue, which `first` returned, cannot run: the agent is told that it sleeps. */
static __always_inline void give_up(struct decision *d, u32 cpu, u64 now)
{
	drop_head(cpu_at(cpu));
	change(d->tid, BLOCKED, MESSAGE_THREAD_BLOCKED, cpu, now);
	answer(d, cpu, OUTCOME_TARGET_NOT_RUNNABLE, now);
}

static int look_again(void *map, u32 *cpu, struct alarm *alarm)
{
	u64 now = bpf_ktime_get_ns();
	bool attend;

	bpf_spin_lock(&lock);
	attend = compare(*cpu, now);
	bpf_spin_unlock(&lock);
	if (attend)
		notify(EVENT_ATTEND, 0, *cpu);
	return 0;
}

/* Decisions may have come for any CPU: commit those that name what runs there already. Takes the lock. True if hostd must step in. */
static __always_inline bool settle(u64 now)
{
	bool attend = false;
	u32 cpu;

	bpf_for(cpu, 0, host.cpus) {
		struct cpu *c = cpu_at(cpu);

		if (c->staged && c->running < 0 && c->stray >= 0) {
			bpf_spin_lock(&lock);
			attend |= compare(cpu, now);
			bpf_spin_unlock(&lock);
		}
	}
	return attend;
}

/* A member leaves the CPU, for good or for a while. */
static __always_inline void leave(s32 tid, u32 cpu, u32 state, bool to_member, bool to_hostd, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	struct thread *t = thread_at(tid);
	bool committed = c->running == tid;
	u32 type = MESSAGE_THREAD_BLOCKED;

	t->ran_ns += now - t->since_ns;
	if (c->stray == tid && (state || to_member)) /* else it goes on when hostd, or who else it is, has done */
		c->stray = NOBODY;
	if (t->dying && state & TASK_DEAD) {
		type = MESSAGE_THREAD_DEAD;
	} else if (!state) { /* it can run: another took its place, or it yielded */
		if (!committed) {
			if (t->state == BLOCKED) /* it joined the enclave while it was on its CPU */
				change(tid, RUNNABLE, MESSAGE_THREAD_RUNNABLE, cpu, now);
			return;
		}
		if (to_member)
			vacate(cpu, MESSAGE_THREAD_PREEMPTED, now); /* a yield looks the same from here */
		else if (!to_hostd && !c->taken) { /* a higher class has the CPU; the thread is still the next here */
			c->taken = 1;
			say(MESSAGE_CPU_TAKEN, tid, cpu, 0, now);
		}
		return;
	}
	if (committed)
		vacate(cpu, type, now);
	else if (t->state != BLOCKED || type == MESSAGE_THREAD_DEAD)
		change(tid, type == MESSAGE_THREAD_DEAD ? ABSENT : BLOCKED, type, cpu, now);
	else
		t->seq++;
	if (type == MESSAGE_THREAD_DEAD)
		t->pid = 0;
}

/* A member comes onto the CPU. True if hostd must step in. */
static __always_inline bool arrive(s32 tid, u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	struct thread *t = thread_at(tid);

	t->since_ns = now;
	back(cpu, now);
	if (c->running == tid)
		return false;
	if (c->running >= 0) /* hostd moved it behind others, or the kernel did */
		vacate(cpu, MESSAGE_THREAD_PREEMPTED, now);
	if (t->state == RUNNING) /* of another CPU, and the kernel moved it here */
		vacate(t->cpu, MESSAGE_THREAD_PREEMPTED, now);
	if (t->state == BLOCKED) /* it joined the enclave when it could run already */
		change(tid, RUNNABLE, MESSAGE_THREAD_RUNNABLE, cpu, now);
	stray(tid, cpu);
	count_try(cpu, tid);
	return compare(cpu, now);
}

SEC("tp_btf/sched_switch")
int BPF_PROG(on_switch, bool preempt, struct task_struct *prev, struct task_struct *next, unsigned int prev_state)
{
	s32 cpu = enclave_cpu(bpf_get_smp_processor_id()), out, in;
	bool attend = false, strays = false;
	struct alarm *alarm;
	u32 key;
	u64 now;

	if (cpu < 0)
		return 0;
	out = member_of(prev);
	in = member_of(next);
	if (out < 0 && in < 0 && (next->pid || (cpu_at(cpu)->idle && !cpu_at(cpu)->taken)))
		return 0; /* but a CPU that others leave idle is one the agent must know of */
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&lock);
	drain(now);
	if (out >= 0)
		leave(out, cpu, preempt ? 0 : prev_state, in >= 0, next->tgid == host.hostd, now);
	if (in >= 0) {
		attend = arrive(in, cpu, now);
		strays = cpu_at(cpu)->stray >= 0;
	} else {
		if (!next->pid)
			back(cpu, now);
		if (cpu_at(cpu)->running < 0) {
			first(cpu, now); /* refuses what no longer holds */
			tell_idle(cpu, now);
		}
	}
	bpf_spin_unlock(&lock);
	key = cpu;
	if (attend)
		notify(EVENT_ATTEND, 0, cpu);
	else if (strays && (alarm = bpf_map_lookup_elem(&alarms, &key)))
		bpf_timer_start(&alarm->timer, grace_ns, 0);
	return 0;
}

static __always_inline int woken(struct task_struct *task)
{
	s32 tid = member_of(task);
	bool raise;
	u64 now;

	if (tid < 0)
		return 0;
	now = bpf_ktime_get_ns();
	bpf_spin_lock(&lock);
	if (thread_at(tid)->state == BLOCKED)
		change(tid, RUNNABLE, MESSAGE_THREAD_RUNNABLE, NOBODY, now);
	drain(now);
	raise = thread_at(tid)->lowered && !thread_at(tid)->demoted;
	bpf_spin_unlock(&lock);
	if (settle(now) || raise)
		notify(EVENT_ATTEND, 0, NOBODY);
	return 0;
}

SEC("tp_btf/sched_wakeup")
int BPF_PROG(on_wakeup, struct task_struct *task)
{
	return woken(task);
}

SEC("tp_btf/sched_wakeup_new")
int BPF_PROG(on_wakeup_new, struct task_struct *task)
{
	return woken(task);
}

/* ── hostd's ───────────────────────────────────────────────────────────────────────────────────────────────────────── */

static __always_inline void order(u32 type, s32 tid, u32 cpu)
{
	u64 at = acts.n;

	if (at >= ACTS || !thread_at(tid)->pid) /* 0 would be hostd itself */
		return;
	bounded(at, ACTS);
	acts.act[at].type = type | (thread_at(tid)->lowered ? ACT_LOW : 0);
	acts.act[at].pid = thread_at(tid)->pid;
	acts.act[at].cpu = cpu_at(cpu)->kernel;
	acts.act[at].tid = tid;
	acts.n++;
	host.acts++;
}

/* The thread that runs on the CPU was demoted: lower it. True if that is done now. */
static __always_inline bool lower(u32 cpu)
{
	s32 tid = cpu_at(cpu)->running;
	u64 at = lowered.n;
	struct thread *t;

	if (tid < 0)
		return false;
	t = thread_at(tid);
	if (!t->demoted || t->lowered)
		return false;
	if (at >= CPUS) {
		t->demoted = 0;
		return false;
	}
	bounded(at, CPUS);
	lowered.tid[at] = tid;
	lowered.n++;
	t->lowered = 1;
	order(ACT_LEVEL, tid, cpu);
	return true;
}

/* Who was lowered and is not demoted any more, because it slept or no agent lives, is raised. Takes the lock. Not static, so that the verifier looks at it by
 * itself; so is the next. */
__noinline int raise_again(void)
{
	u32 i;

	lowered.kept = 0;
	bpf_for(i, 0, lowered.n) {
		u64 at = i, to = lowered.kept;
		struct thread *t;

		bounded(at, CPUS);
		bounded(to, CPUS);
		bpf_spin_lock(&lock);
		t = thread_at(lowered.tid[at]);
		if (!host.live)
			t->demoted = 0;
		if (t->demoted) {
			lowered.tid[to] = lowered.tid[at];
			lowered.kept++;
		} else if (t->lowered) { /* else the number is another's by now */
			t->lowered = 0;
			order(ACT_LEVEL, lowered.tid[at], 0);
		}
		bpf_spin_unlock(&lock);
	}
	lowered.n = lowered.kept;
	return 0;
}

/* What there is to be done about a CPU for which something was decided. Takes the lock. */
__noinline int see_to(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	struct decision *d;
	bool leaves;

	bpf_spin_lock(&lock);
	c->rung = 0;
	leaves = take_up(cpu, now);
	if (lower(cpu) && c->staged && head_of(c)->tid >= 0)
		leaves &= thread_at(head_of(c)->tid)->demoted; /* else it leaves by that alone */
	if (leaves)
		order(ACT_TAIL, c->running, cpu);
	if (c->running < 0) {
		d = first(cpu, now);
		if (c->stray >= 0 && (!d || overtaken(d, c)))
			accept(c->stray, cpu, now);
		else if (d && d->tid == c->stray)
			commit(d, cpu, now);
		else if (d && d->flags >= TRIES * TRY) {
			give_up(d, cpu, now);
			if (c->stray >= 0 && !first(cpu, now))
				accept(c->stray, cpu, now);
		} else if (d && (c->stray >= 0 ? lingers(c, now) : host.cpus > 1)) {
			d->flags |= ORDERED;
			order(ACT_HEAD, d->tid, cpu);
		}
	}
	c->deviates = 0;
	bpf_spin_unlock(&lock);
	return 0;
}

SEC("syscall")
int prepare(void *context)
{
	struct alarm *alarm;
	u32 cpu;

	bpf_for(cpu, 0, host.cpus) {
		u32 key = cpu;

		alarm = bpf_map_lookup_elem(&alarms, &key);
		if (!alarm || bpf_timer_init(&alarm->timer, &alarms, 1 /* CLOCK_MONOTONIC */))
			return 1;
		bpf_timer_set_callback(&alarm->timer, look_again);
	}
	return 0;
}

/* A member is governed again: what it did in between is known only as far as it did it on the enclave's CPUs. It counts as blocked, as one that joins does,
 * until hostd sees it wait (`seen_runnable`), or an event shows it. */
SEC("syscall")
int unsettle(struct adopt *a)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = thread_at(a->tid);

	bpf_spin_lock(&lock);
	if (t->pid == a->pid) {
		if (t->state == RUNNING)
			vacate(t->cpu, MESSAGE_THREAD_BLOCKED, now);
		else if (t->state == RUNNABLE)
			change(a->tid, BLOCKED, MESSAGE_THREAD_BLOCKED, NOBODY, now);
	}
	bpf_spin_unlock(&lock);
	return 0;
}

/* The doorbell rang, or the kernel runs what was not decided: say what is to be done about it, in `acts`. */
SEC("syscall")
int attend(void *context)
{
	u64 now = bpf_ktime_get_ns();
	u32 i, taken, cpu;

	acts.n = 0;
	bpf_for(i, 0, TXNS / DRAIN) {
		bpf_spin_lock(&lock);
		taken = drain(now);
		bpf_spin_unlock(&lock);
		if (taken < DRAIN)
			break;
	}
	raise_again();
	bpf_for(cpu, 0, host.cpus)
		if (cpu_at(cpu)->staged)
			see_to(cpu, now);
	return acts.n;
}
