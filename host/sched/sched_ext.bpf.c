/* Mechanism `sched_ext`: the enclave's threads are of the class SCHED_EXT, and run where and when a decision says so; nothing else is governed.
 *
 * A thread that becomes runnable is reported and held. A CPU that needs a thread takes the first decision staged for it that holds, checked under
 * the lock; if there is none it reports itself idle, and the agent's next decision rings its doorbell: hostd runs `attend`, which kicks the
 * CPU. Without an agent - none yet, silent, or messages were lost - threads go through one FIFO queue of the kernel's, so none is ever stuck.
 * A thread runs until it blocks or a decision preempts it.
 *
 * Partial mode. The scheduler is loaded with SWITCH_PARTIAL: it has the threads whose policy is SCHED_EXT, and hostd gives that to members alone. Their
 * class stands below the fair one, so any ordinary thread may take an enclave's CPU at any time (CPU_TAKEN, CPU_BACK): keep others off it. The committed
 * thread stays the CPU's meanwhile, and goes on afterwards.
 *
 * Order of the kernel's calls, for one thread: enable, set_weight, set_cpumask; then again and again runnable, enqueue, (dispatch,) running, tick...,
 * stopping, quiescent; at last disable. A change of class, weight or affinity takes a queued thread out and puts it back: quiescent without SLEEP, runnable,
 * enqueue, which is no news to the agent. A thread that joins while it is on a CPU begins with `running`; one that blocks has `stopping` before `quiescent`, so
 * its CPU time is whole when the agent hears of it. All of these hold the lock of the thread's run queue, and take ours inside it; timer and syscall programs
 * hold no run queue's lock. Where ours is held nothing of the kernel's is called, so there is one order of locks.
 *
 * Queues. Held threads stand in HELD, a queue of the scheduler's own. A decision does not insert its thread into a CPU's local queue: the thread may have been
 * bound elsewhere since it was checked (affinity is the kernel's, and changes under another lock), and a scheduler that sends a thread to the local queue of a CPU
 * it may not use is ended on the spot. So it goes from HELD to a queue of that CPU, which only that CPU consumes, and the kernel passes over who may not run there;
 * then it goes back, and its decision ends as a preemption.
 *
 * Races, and who wins.
 * - A decision is taken up between `runnable` and `enqueue`: the thread is not in HELD yet, `bring` fails, the agent hears PREEMPTED and decides again.
 * - The committed thread is not there when its CPU looks (a higher class had the CPU and it was put back, or it was bound elsewhere): it is brought again, or else
 *   given up as preempted.
 * - The kernel runs a thread that nobody decided on: one that exits, or may not migrate now, goes straight to its CPU. It is a stray: its slice is 0, so it
 *   is back in HELD at the next tick, and what was committed there is told as preempted.
 * - A thread exits: the agent hears of it when it leaves its CPU for the last time; `disable` comes with its last reference, and may find its number given away.
 * - Agents come and go under the lock; a decision made for another generation of the ring has another mark.
 *
 * The kernel's own watch (timeout_ms, 30 s is the most it allows) ends a scheduler under which a runnable thread has waited so long, whoever
 * decided that: a policy without preemption may. hostd then lets the threads be, says why, and registers anew for the agent that comes back.
 */
#include "wave.bpf.h"
#include "scx.h"

#define TASK_DEAD 0x80 /* linux/sched.h */
#define PF_KTHREAD 0x00200000
#define HELD 1       /* the queue of threads that wait: for a decision, or without an agent for their turn */
#define QUEUE_OF 16  /* + enclave's CPU: the queue of what was decided for it */
#define TRIES 3      /* decisions that one look may find overtaken by what the kernel does meanwhile */
#define TURN_NS 5000000
#define WATCH_NS 5000000

u64 silent_ns = 20000000; /* set by hostd */

struct watch {
	struct bpf_timer timer;
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct watch);
} watch SEC(".maps");

/* Why the kernel took its threads back; kind 0: it has not. */
struct ended {
	u64 kind; /* enum scx_exit_kind */
	char reason[64];
	char message[192];
};
struct ended ended SEC(".bss.ended");

/* True while decisions rule. */
static __always_inline bool governed(void)
{
	return host.live && !host.lost;
}

/* True of a member that bound itself to CPUs that are none of the enclave's. */
static __always_inline bool elsewhere(struct thread *t)
{
	u64 any = 0;

	for (int i = 0; i < CPUS / 64; i++)
		any |= t->allowed[i];
	return !any;
}

/* ── a thread's life ───────────────────────────────────────────────────────────────────────────────────────────────── */

SEC("struct_ops/select_cpu")
s32 BPF_PROG(wave_select_cpu, struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	bool idle = false;

	if (governed() && member_of(p) >= 0)
		return prev_cpu; /* a decision says where; until then it does not matter */
	return scx_bpf_select_cpu_dfl___v1(p, prev_cpu, wake_flags, &idle);
}

SEC("struct_ops/runnable")
void BPF_PROG(wave_runnable, struct task_struct *p, u64 enq_flags)
{
	s32 tid = member_of(p);
	u64 now = bpf_ktime_get_ns();

	if (tid < 0)
		return;
	bpf_spin_lock(&lock);
	if (thread_at(tid)->state == BLOCKED && !elsewhere(thread_at(tid)))
		change(tid, RUNNABLE, MESSAGE_THREAD_RUNNABLE, NOBODY, now);
	bpf_spin_unlock(&lock);
}

/* A thread wakes: a CPU whose thread is demoted is to make way for it, unless one idles, of which the agent disposes. NOBODY: none is. Looks without the lock,
 * since most often there is none; the CPU looks again, with it. */
static __always_inline s32 claim_cpu(s32 tid)
{
	struct thread *t = thread_at(tid);
	s32 claimed = NOBODY;
	bool idle = false;
	u32 cpu;

	bpf_for(cpu, 0, host.cpus) {
		struct cpu *c = cpu_at(cpu);
		s32 running = c->running;

		if (running < 0)
			idle |= !c->taken;
		else if (claimed < 0 && !c->claimant && !c->taken && thread_at(running)->demoted &&
			 (t->allowed[(cpu >> 6) & (CPUS / 64 - 1)] >> (cpu & 63)) & 1)
			claimed = cpu;
	}
	if (idle || claimed < 0 || t->state != RUNNABLE || t->demoted)
		return NOBODY;
	cpu_at(claimed)->claimant = 1 + tid;
	return claimed;
}

SEC("struct_ops/enqueue")
void BPF_PROG(wave_enqueue, struct task_struct *p, u64 enq_flags)
{
	s32 tid = member_of(p), cpu;

	if (tid < 0 || elsewhere(thread_at(tid))) { /* of the class, but not ours: as if there were no scheduler */
		insert(p, SCX_DSQ_GLOBAL, SCX_SLICE_DFL, enq_flags);
		return;
	}
	insert(p, HELD, SCX_SLICE_INF, enq_flags);
	if (!(enq_flags & enq_flag(SCX_ENQ_WAKEUP)) || !governed())
		return;
	cpu = claim_cpu(tid);
	if (cpu >= 0 && !kick(cpu_at(cpu)->kernel, SCX_KICK_PREEMPT)) {
		cpu_at(cpu)->rung = 1;
		notify(EVENT_ATTEND, 0, cpu);
	}
}

SEC("struct_ops/running")
void BPF_PROG(wave_running, struct task_struct *p)
{
	s32 tid = member_of(p), cpu = enclave_cpu(bpf_get_smp_processor_id());
	u64 now = bpf_ktime_get_ns(), turn_ns = SCX_SLICE_INF;
	struct thread *t;
	struct cpu *c;

	if (tid < 0)
		return;
	t = thread_at(tid);
	bpf_spin_lock(&lock);
	t->since_ns = now;
	if (t->state == BLOCKED && !elsewhere(t)) /* it joined while it was on its CPU */
		change(tid, RUNNABLE, MESSAGE_THREAD_RUNNABLE, NOBODY, now);
	if (cpu >= 0) {
		c = cpu_at(cpu);
		if (c->running != tid) { /* without a decision: for a turn if there is no agent, else until the next look */
			if (c->running >= 0)
				vacate(cpu, MESSAGE_THREAD_PREEMPTED, now);
			stray(tid, cpu);
			turn_ns = governed() ? 0 : TURN_NS;
		}
	}
	bpf_spin_unlock(&lock);
	if (turn_ns != SCX_SLICE_INF)
		set_slice(p, turn_ns);
}

SEC("struct_ops/stopping")
void BPF_PROG(wave_stopping, struct task_struct *p, bool runnable)
{
	s32 tid = member_of(p), cpu = enclave_cpu(bpf_get_smp_processor_id());
	u64 now = bpf_ktime_get_ns();
	bool rung = false;

	if (tid < 0)
		return;
	bpf_spin_lock(&lock);
	thread_at(tid)->ran_ns += now - thread_at(tid)->since_ns;
	if (cpu >= 0) {
		if (cpu_at(cpu)->stray == tid)
			cpu_at(cpu)->stray = NOBODY;
		rung = cpu_at(cpu)->rung;
	}
	bpf_spin_unlock(&lock);
	if (runnable && rung) /* hostd hopped here: the CPU is to look, not to go on with what it had */
		set_slice(p, 0);
}

/* The thread is nothing to schedule any more, for a while or for good. */
static __always_inline void leave(s32 tid, bool dead, u64 now)
{
	struct thread *t = thread_at(tid);
	u32 type = dead ? MESSAGE_THREAD_DEAD : MESSAGE_THREAD_BLOCKED;

	if (t->state == RUNNING)
		vacate(t->cpu, type, now);
	else if (t->state == RUNNABLE || (dead && t->state == BLOCKED))
		change(tid, dead ? ABSENT : BLOCKED, type, NOBODY, now);
	if (dead)
		t->pid = 0; /* hostd may give its number to another */
}

SEC("struct_ops/quiescent")
void BPF_PROG(wave_quiescent, struct task_struct *p, u64 deq_flags)
{
	s32 tid = member_of(p);
	u64 now = bpf_ktime_get_ns();
	bool dead;

	if (tid < 0 || !(deq_flags & SCX_DEQ_SLEEP))
		return;
	dead = p->__state & TASK_DEAD;
	bpf_spin_lock(&lock);
	leave(tid, dead, now);
	bpf_spin_unlock(&lock);
}

SEC("struct_ops/yield")
bool BPF_PROG(wave_yield, struct task_struct *from, struct task_struct *to)
{
	s32 tid = member_of(from);
	u64 now = bpf_ktime_get_ns();
	struct thread *t;

	if (tid < 0)
		return false;
	t = thread_at(tid);
	bpf_spin_lock(&lock);
	if (t->state == RUNNING)
		vacate(t->cpu, MESSAGE_THREAD_YIELDED, now);
	bpf_spin_unlock(&lock);
	set_slice(from, 0); /* so that the CPU looks for another */
	return false;
}

SEC("struct_ops/tick")
void BPF_PROG(wave_tick, struct task_struct *p)
{
	s32 tid = member_of(p), cpu = enclave_cpu(bpf_get_smp_processor_id());
	u64 now = bpf_ktime_get_ns();
	bool look;

	if (tid < 0 || cpu < 0)
		return;
	bpf_spin_lock(&lock);
	if (cpu_at(cpu)->running == tid)
		say(MESSAGE_TICK, tid, cpu, 0, now);
	look = cpu_at(cpu)->rung || (!governed() && scx_of(p)->slice > TURN_NS);
	bpf_spin_unlock(&lock);
	if (look) /* where the kernel cannot be kicked nobody else says so */
		set_slice(p, 0);
}

SEC("struct_ops/set_cpumask")
void BPF_PROG(wave_set_cpumask, struct task_struct *p, const struct cpumask *mask)
{
	u64 allowed[CPUS / 64] = {}, changed = 0, now = bpf_ktime_get_ns();
	s32 tid = member_of(p);
	struct thread *t;
	u32 cpu;

	if (tid < 0)
		return;
	bpf_for(cpu, 0, host.cpus)
		if (bpf_cpumask_test_cpu(cpu_at(cpu)->kernel, mask))
			allowed[(cpu >> 6) & (CPUS / 64 - 1)] |= 1ull << (cpu & 63);
	t = thread_at(tid);
	bpf_spin_lock(&lock);
	for (int i = 0; i < CPUS / 64; i++) {
		changed |= t->allowed[i] ^ allowed[i];
		t->allowed[i] = allowed[i];
	}
	if (changed) { /* else it is only joining the class, of which the kernel says this, too */
		t->seq++; /* what was decided may name a CPU that it no longer may use */
		tell(MESSAGE_AFFINITY_CHANGED, tid, NOBODY, 0, now);
		if (elsewhere(t))
			leave(tid, false, now); /* the kernel's own, until it comes back */
	}
	bpf_spin_unlock(&lock);
}

SEC("struct_ops/set_weight")
void BPF_PROG(wave_set_weight, struct task_struct *p, u32 weight)
{
	s32 tid = member_of(p);
	u64 now = bpf_ktime_get_ns();

	if (tid < 0)
		return;
	bpf_spin_lock(&lock);
	if (thread_at(tid)->state != ABSENT)
		tell(MESSAGE_PRIORITY_CHANGED, tid, NOBODY, 0, now);
	bpf_spin_unlock(&lock);
}

/* It left the class: it has exited, hostd has let it go, somebody gave it another class, or the scheduler is being unregistered. For the agent it then
 * sleeps; when it comes back `runnable` or `running` says so. A thread that has exited is told of in `quiescent`, and comes here when it is reaped: its
 * number may be another's by then. */
SEC("struct_ops/disable")
void BPF_PROG(wave_disable, struct task_struct *p)
{
	s32 tid = member_of(p);
	u64 now = bpf_ktime_get_ns();
	struct thread *t;

	if (tid < 0)
		return;
	t = thread_at(tid);
	bpf_spin_lock(&lock);
	if (t->pid == p->pid)
		leave(tid, t->dying, now);
	bpf_spin_unlock(&lock);
}

/* ── a CPU's ───────────────────────────────────────────────────────────────────────────────────────────────────────── */

/* The demoted thread on the CPU makes way for the one that woke. */
static __always_inline void make_way(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	s32 tid = (s32)c->claimant - 1;

	c->claimant = 0;
	if (tid < 0 || c->running < 0 || !thread_at(c->running)->demoted || thread_at(tid)->state != RUNNABLE)
		return;
	vacate(cpu, MESSAGE_THREAD_PREEMPTED, now);
	accept(tid, cpu, now);
}

/* The CPU looks for its next thread: take in what came for it. */
static __always_inline void arrive(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);

	drain(now);
	make_way(cpu, now);
	if (c->rung) {
		c->rung = 0;
		if (take_up(cpu, now))
			vacate(cpu, MESSAGE_THREAD_PREEMPTED, now);
	}
}

/* What the CPU runs next, as decided; NOBODY: nothing is. */
static __always_inline s32 choose(u32 cpu, u64 now)
{
	struct decision *d;
	s32 tid;

	if (cpu_at(cpu)->running >= 0) /* it goes on; or was put back while a higher class had the CPU, and is brought again */
		return cpu_at(cpu)->running;
	d = first(cpu, now);
	if (!d) {
		tell_idle(cpu, now);
		return NOBODY;
	}
	tid = d->tid;
	commit(d, cpu, now);
	return tid;
}

/* Bring the thread that was committed to the CPU there, from where it waits. It goes through a queue of the CPU's, not straight to it: the kernel
 * passes over a thread in a queue that may not run here, but ends a scheduler that sends one. False: it does not wait any more, or may not run here. */
static __always_inline bool bring(s32 tid, u32 cpu)
{
	struct task_struct *p = bpf_task_from_pid(thread_at(tid)->pid);
	bool moved, came;

	if (!p)
		return false;
	moved = move(p, HELD, QUEUE_OF + cpu, SCX_SLICE_INF, 0);
	came = moved && to_local(QUEUE_OF + cpu);
	if (moved && !came)
		move(p, QUEUE_OF + cpu, HELD, SCX_SLICE_INF, 0);
	bpf_task_release(p);
	return came;
}

SEC("struct_ops/dispatch")
void BPF_PROG(wave_dispatch, s32 kernel, struct task_struct *prev)
{
	s32 cpu = enclave_cpu(kernel), before = NOBODY, tid;
	u64 now = bpf_ktime_get_ns();
	bool rule;
	u32 i;

	if (cpu < 0) /* a member's affinity is the enclave, so none waits for this CPU */
		return;
	if (prev && queued(prev))
		before = member_of(prev);
	bpf_spin_lock(&lock);
	back(cpu, now);
	rule = governed();
	if (rule)
		arrive(cpu, now);
	bpf_spin_unlock(&lock);
	if (!rule) {
		if (!to_local(HELD) && prev && before >= 0)
			set_slice(prev, TURN_NS);
		return;
	}
	bpf_for(i, 0, TRIES) {
		bpf_spin_lock(&lock);
		tid = choose(cpu, now);
		bpf_spin_unlock(&lock);
		if (tid < 0)
			return;
		if (prev && tid == before) {
			set_slice(prev, SCX_SLICE_INF);
			return;
		}
		if (bring(tid, cpu))
			return;
		bpf_spin_lock(&lock);
		if (cpu_at(cpu)->running == tid)
			vacate(cpu, MESSAGE_THREAD_PREEMPTED, now);
		bpf_spin_unlock(&lock);
	}
	bpf_spin_lock(&lock);
	tell_idle(cpu, now);
	bpf_spin_unlock(&lock);
}

/* A class above ours has the CPU. */
static __always_inline void taken(u32 cpu, struct task_struct *by, u64 now)
{
	struct cpu *c = cpu_at(cpu);

	if (by->tgid == host.hostd || by->flags & PF_KTHREAD) /* for a moment, and on our behalf: no news */
		return;
	bpf_spin_lock(&lock);
	if (!c->taken) {
		c->taken = 1;
		c->idle = 0;
		say(MESSAGE_CPU_TAKEN, c->running, cpu, 0, now);
	}
	bpf_spin_unlock(&lock);
}

/* `cpu_release` tells of a CPU that is taken from a thread of ours; of one that idled, only this does. It is back when `dispatch` asks for it. */
SEC("tp_btf/sched_switch")
int BPF_PROG(on_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	s32 cpu = enclave_cpu(bpf_get_smp_processor_id());

	if (cpu >= 0 && !prev->pid && next->pid && member_of(next) < 0)
		taken(cpu, next, bpf_ktime_get_ns());
	return 0;
}

SEC("struct_ops/cpu_release")
void BPF_PROG(wave_cpu_release, s32 kernel, struct scx_cpu_release_args *args)
{
	s32 cpu = enclave_cpu(kernel);

	if (cpu >= 0)
		taken(cpu, args->task, bpf_ktime_get_ns());
}

SEC("struct_ops/cpu_acquire")
void BPF_PROG(wave_cpu_acquire, s32 kernel, struct scx_cpu_acquire_args *args)
{
	s32 cpu = enclave_cpu(kernel);
	u64 now = bpf_ktime_get_ns();

	if (cpu < 0)
		return;
	bpf_spin_lock(&lock);
	back(cpu, now);
	bpf_spin_unlock(&lock);
}

/* ── the watch over the agent ──────────────────────────────────────────────────────────────────────────────────────── */

static __always_inline void kick_all(void)
{
	u32 cpu;

	bpf_for(cpu, 0, host.cpus)
		kick(cpu_at(cpu)->kernel, SCX_KICK_PREEMPT);
}

/* Every 5 ms, whatever becomes of hostd: is the agent silent, were messages lost? Then the FIFO queue takes over. */
static int look(void *map, u32 *key, struct watch *w)
{
	u64 now = bpf_ktime_get_ns(), beat = *(volatile u64 *)&txns.header[RING_HEARTBEAT_AT];
	bool lost = false;

	bpf_spin_lock(&lock);
	if (host.live && now > beat && now - beat > silent_ns) {
		host.live = 0;
		host.fallbacks++;
		lost = true;
	}
	bpf_spin_unlock(&lock);
	if (lost || (!governed() && scx_bpf_dsq_nr_queued(HELD) > 0))
		kick_all();
	bpf_timer_start(&w->timer, WATCH_NS, 0);
	return 0;
}

SEC("struct_ops.s/init")
s32 BPF_PROG(wave_init)
{
	struct watch *w;
	u32 key = 0, cpu;

	w = bpf_map_lookup_elem(&watch, &key);
	if (!w)
		return -1;
	bpf_timer_init(&w->timer, &watch, 1 /* CLOCK_MONOTONIC */);
	bpf_timer_set_callback(&w->timer, look);
	bpf_timer_start(&w->timer, WATCH_NS, 0);
	bpf_for(cpu, 0, host.cpus)
		if (make_queue(QUEUE_OF + cpu))
			return -1;
	return make_queue(HELD);
}

SEC("struct_ops/exit")
void BPF_PROG(wave_exit, struct scx_exit_info *info)
{
	host.live = 0;
	bpf_probe_read_kernel_str(ended.reason, sizeof(ended.reason), info->reason);
	bpf_probe_read_kernel_str(ended.message, sizeof(ended.message), info->msg);
	ended.kind = info->kind;
}

/* CPUs, by the kernel's numbers, that hostd must visit because this kernel cannot be asked to kick them. */
struct visits {
	u64 n;
	u32 cpu[CPUS];
};
struct visits visits SEC(".bss.visits");

/* The doorbell rang, or hostd looks now and then: make the CPUs look whose decisions cannot wait. Returns how many hostd is to visit. */
SEC("syscall")
int attend(void *context)
{
	u64 now = bpf_ktime_get_ns(), at;
	u32 i, taken, cpu;

	visits.n = 0;
	bpf_for(i, 0, TXNS / DRAIN) {
		bpf_spin_lock(&lock);
		taken = drain(now);
		bpf_spin_unlock(&lock);
		if (taken < DRAIN)
			break;
	}
	bpf_for(cpu, 0, host.cpus) {
		struct cpu *c = cpu_at(cpu);

		if (governed() ? !c->rung : scx_bpf_dsq_nr_queued(HELD) <= 0)
			continue;
		host.acts++;
		if (!kick(c->kernel, c->running >= 0 || c->stray >= 0 ? SCX_KICK_PREEMPT : 0)) {
			at = visits.n++;
			bounded(at, CPUS);
			visits.cpu[at] = c->kernel;
		}
	}
	return visits.n;
}

SEC(".struct_ops.link")
struct sched_ext_ops wave_ops = {
	.select_cpu = (void *)wave_select_cpu,
	.runnable = (void *)wave_runnable,
	.enqueue = (void *)wave_enqueue,
	.running = (void *)wave_running,
	.stopping = (void *)wave_stopping,
	.quiescent = (void *)wave_quiescent,
	.yield = (void *)wave_yield,
	.tick = (void *)wave_tick,
	.set_cpumask = (void *)wave_set_cpumask,
	.set_weight = (void *)wave_set_weight,
	.disable = (void *)wave_disable,
	.dispatch = (void *)wave_dispatch,
	.cpu_release = (void *)wave_cpu_release,
	.cpu_acquire = (void *)wave_cpu_acquire,
	.init = (void *)wave_init,
	.exit = (void *)wave_exit,
	.flags = SCX_OPS_SWITCH_PARTIAL | SCX_OPS_ENQ_LAST,
	.timeout_ms = 30000,
	.name = "wave",
};
