/* The host's half of a scheduling enclave, in the kernel: who runs where, what is staged, what became of it.
 *
 * Both mechanisms include this file and add when a CPU looks for a thread and how one is put there. What they share: the two rings in the format
 * of waveos.ring, the tables of threads and CPUs with their sequence numbers, the checks of every decision, and the replay of the whole state.
 *
 * One lock an enclave guards all of it: a message's place in the ring is then the order in which things happened. Functions are called with
 * the lock held unless they say otherwise; BPF allows no helper and no kfunc under it, so times are taken before and acts done after.
 * (Calling static functions under a lock wants Linux 6.9.) What the agent can write - a credit, a decision - is checked here and never trusted.
 */
#pragma once

#include "kernel.h"
#include "wave_records.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define THREADS 4096  /* of the contract's 65,536; a power of two */
#define CPUS 256      /* of the contract's 1,024 */
#define STAGED 8      /* decisions a CPU holds; the agent's runtime sends at most 4 */
#define MESSAGES 4096 /* slots of the rings */
#define TXNS 1024
#define MESSAGES_SHIFT 12
#define TXNS_SHIFT 10
#define DRAIN 16 /* decisions taken in at one event: bounds the time under the lock */
#define BUCKETS 256

enum thread_state { ABSENT, BLOCKED, RUNNABLE, RUNNING };
enum { NOBODY = -1, COMING = -2 };

/* ── what the agent shares ─────────────────────────────────────────────────────────────────────────────────────────── */

struct messages {
	u64 header[RING_HEADER_WORDS];
	struct wave_message slot[MESSAGES];
};
struct txns {
	u64 header[RING_HEADER_WORDS];
	struct wave_decision slot[TXNS];
};
struct hint {
	s64 deadline_ns;
	s64 work_ns;
	u8 request_class;
	u8 qos;
	u8 spare[6];
};

struct messages messages SEC(".bss.messages") __attribute__((aligned(64)));
struct txns txns SEC(".bss.txns") __attribute__((aligned(64)));
struct hint hints[THREADS] SEC(".bss.hints"); /* the applications': what a thread works on */

/* ── the host's own ────────────────────────────────────────────────────────────────────────────────────────────────── */

struct decision {
	u64 seq, basis_ns, decided_ns, txn;
	s32 tid;
	u32 flags, cpu_seq, type;
};
struct thread {
	u64 seq;       /* state changes; goes on when the number is given to another thread, so an old decision stays stale */
	u64 since_ns;  /* on a CPU since */
	u64 ran_ns;    /* CPU time of this activation */
	u32 pid;       /* the kernel's; 0: the number is free */
	s32 cpu;       /* where it runs, or ran last, by decision or as a stray */
	u32 epoch;     /* of the replay in which the agent heard of it */
	u8 state;
	u8 dying;
	u8 demoted;    /* makes way for others that wake, until it blocks */
	u8 lowered;    /* mechanism `priority`: hostd has given it the lower priority */
	u64 allowed[CPUS / 64]; /* enclave CPUs it may run on */
};
struct cpu {
	s32 running;   /* the thread committed here, or NOBODY */
	s32 stray;     /* a thread the kernel runs here without a decision, or NOBODY */
	u32 seq;       /* changes of `running` */
	u32 kernel;    /* the kernel's number */
	u32 head;      /* of `queue` */
	u32 staged;
	u8 present;
	u8 idle;       /* the agent was told */
	u8 taken;      /* by a higher class; the agent was told */
	u8 rung;       /* its doorbell rang: look at the queue */
	u8 deviates;   /* what runs is not what was decided; told to hostd */
	u8 spare[3];
	u32 claimant;  /* mechanism `sched_ext`: 1 + a thread that woke, for which the demoted one makes way when the CPU looks; 0: none */
	u32 spare2;
	struct decision queue[STAGED];
};
struct host {
	u64 up_next, up_credit; /* positions in the ring of messages */
	u64 down_next, down_credit;
	u32 generation;
	u32 epoch;     /* of the replay */
	u32 cpus;
	u32 hostd;     /* pid of the daemon, whose own turns on a CPU are no news */
	u8 live;       /* an agent is attached and alive */
	u8 lost;       /* messages were lost, or a new agent has heard none; nothing is sent until the state is replayed */
	u8 spare[6];
	u64 overflow;  /* messages that found the ring full */
	u64 outcomes[16];
	u64 messages;
	u64 decisions;
	u64 strays;     /* times the kernel ran a thread before a decision said so */
	u64 deviations; /* times it ran another than the one decided */
	u64 acts;       /* times hostd had to step in */
	u64 fallbacks;
	u64 age[BUCKETS];        /* age of the state behind committed decisions, at commit: those that waited for their CPU */
	u64 round_trip[BUCKETS]; /* likewise, of those for a CPU that was waiting or is preempted: from the event to the act */
	u64 enforced[BUCKETS];   /* from decided to committed, of the same */
	s16 enclave_cpu[1024]; /* the enclave's number of the kernel's CPU; -1: not in the enclave */
	struct thread thread[THREADS];
	struct cpu cpu[CPUS];
};
struct host host SEC(".bss.host");

struct member {
	s32 tid;
};
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct member);
} members SEC(".maps");

/* To hostd: what it must know at once. */
enum event_type { EVENT_ATTEND = 1, EVENT_FORK, EVENT_GONE, EVENT_EXEC };
struct event {
	u32 type;
	u32 pid;
	s32 tid;
	u32 from_pid; /* FORK: its parent's; EXEC: what the thread's was */
};
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
} events SEC(".maps");

static struct bpf_spin_lock lock SEC(".bss.lock");
static u64 ordering SEC(".bss.lock"); /* an exchange on it is a full barrier on every architecture */

static volatile u32 zero SEC(".bss.lock"); /* a beginning that the verifier does not know, so that it looks at a loop's body once and not once a turn */

#define full_barrier() __sync_lock_test_and_set(&ordering, 0)
/* In a loop's condition: tells the verifier that the loop ends (the instruction may_goto, Linux 6.9; every loop here has its own, smaller bound). */
#define can_loop                                                                                                            \
	({                                                                                                                  \
		__label__ over, on;                                                                                         \
		bool loops = true;                                                                                          \
		asm volatile goto("1: .byte 0xe5; .byte 0; .long ((%l[over] - 1b - 8) / 8) & 0xffff; .short 0" : : : : over); \
		goto on;                                                                                                    \
over:                                                                                                                       \
		loops = false;                                                                                              \
on:;                                                                                                                        \
		loops;                                                                                                      \
	})
#define bounded(value, power) asm volatile("%[v] &= %[m]" : [v] "+r"(value) : [m] "i"((power) - 1))

static __always_inline struct thread *thread_at(u64 tid)
{
	bounded(tid, THREADS);
	return &host.thread[tid];
}

static __always_inline struct cpu *cpu_at(u64 cpu)
{
	bounded(cpu, CPUS);
	return &host.cpu[cpu];
}

/* The enclave's number of a kernel CPU; NOBODY outside. */
static __always_inline s32 enclave_cpu(u64 kernel)
{
	if (kernel >= 1024)
		return NOBODY;
	return host.enclave_cpu[kernel];
}

/* The enclave's number of a thread; less than 0 outside. */
static __always_inline s32 member_of(struct task_struct *task)
{
	struct member *m = bpf_task_storage_get(&members, task, 0, 0);

	return m ? m->tid : NOBODY;
}

/* Tell hostd. Not under the lock. */
static __always_inline void notify_from(u32 type, u32 pid, s32 tid, u32 from_pid)
{
	struct event e = {.type = type, .pid = pid, .tid = tid, .from_pid = from_pid};

	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
}

static __always_inline void notify(u32 type, u32 pid, s32 tid)
{
	notify_from(type, pid, tid, 0);
}

/* Which of 256 buckets: four to each power of two of ns. */
static __always_inline u32 bucket(u64 ns)
{
	u32 log = 0;

	if (ns < 4)
		return ns;
	if (ns >> 32)
		return BUCKETS - 1;
	if (ns >> (log + 16))
		log += 16;
	if (ns >> (log + 8))
		log += 8;
	if (ns >> (log + 4))
		log += 4;
	if (ns >> (log + 2))
		log += 2;
	if (ns >> (log + 1))
		log += 1;
	return (log << 2) | ((ns >> (log - 2)) & 3);
}

static __always_inline void count(u64 *histogram, u64 from_ns, u64 now)
{
	u64 at = from_ns < now ? bucket(now - from_ns) : 0;

	bounded(at, BUCKETS);
	histogram[at]++;
}

/* ── host to agent ─────────────────────────────────────────────────────────────────────────────────────────────────── */

/* The slot of the next message; NULL if there is no room, which is counted and ends all talk until the state is replayed. */
static __always_inline struct wave_message *claim(void)
{
	u64 at = host.up_next, sent = host.up_next - host.up_credit;

	if (!host.live || host.lost)
		return NULL;
	if (sent >= MESSAGES) {
		u64 credit = *(volatile u64 *)&messages.header[RING_CREDIT_AT];

		if (credit - host.up_credit <= sent) /* else it is none: the word is the agent's to write */
			host.up_credit = credit;
		if (host.up_next - host.up_credit >= MESSAGES) {
			host.lost = 1;
			host.overflow++;
			messages.header[RING_OVERFLOW_AT] = host.overflow;
			return NULL;
		}
	}
	bounded(at, MESSAGES);
	return &messages.slot[at];
}

/* The record is whole: give it its mark, last. */
static __always_inline void publish(struct wave_message *m, u64 type)
{
	u32 mark = (host.generation << 16) + (u32)(host.up_next >> MESSAGES_SHIFT) + 1;

	host.up_next++;
	host.messages++;
	__sync_lock_test_and_set((u64 *)m, type << 48 | (u64)WAVE_SUBSYSTEM_SCHED << 40 | (u64)WAVE_VERSION << 32 | mark);
}

static __noinline void say(u32 type, s32 tid, s32 cpu, u32 front, u64 now)
{
	struct wave_message *m = claim();
	u64 number = tid;

	if (!m)
		return;
	m->time_ns = now;
	m->tid = tid;
	m->cpu = cpu;
	m->outcome = 0;
	m->front = front;
	m->cpu_seq = cpu >= 0 ? cpu_at(cpu)->seq : 0;
	if (tid >= 0) {
		struct thread *t = thread_at(tid);

		bounded(number, THREADS);
		m->seq = t->seq;
		m->ran_ns = t->ran_ns;
		m->request_class = hints[number].request_class;
		m->qos = hints[number].qos;
		m->deadline_ns = hints[number].deadline_ns;
		m->work_ns = hints[number].work_ns;
	} else {
		m->seq = 0;
		m->ran_ns = 0;
		m->request_class = 0;
		m->qos = 0;
		m->deadline_ns = 0;
		m->work_ns = 0;
	}
	publish(m, type);
}

/* The thread is nobody's stray any more. */
static __always_inline void unstray(s32 tid)
{
	struct thread *t = thread_at(tid);

	if (t->cpu >= 0 && cpu_at(t->cpu)->stray == tid)
		cpu_at(t->cpu)->stray = NOBODY;
}

/* The kernel runs the thread there without a decision. */
static __always_inline void stray(s32 tid, u32 cpu)
{
	unstray(tid);
	thread_at(tid)->cpu = cpu;
	cpu_at(cpu)->stray = tid;
	host.strays++;
}

/* News of a thread; the first after a replay began introduces it. */
static __always_inline void tell(u32 type, s32 tid, s32 cpu, u32 front, u64 now)
{
	struct thread *t = thread_at(tid);

	if (t->epoch != host.epoch) {
		t->epoch = host.epoch;
		say(MESSAGE_THREAD_NEW, tid, NOBODY, 0, now);
	}
	if (type != MESSAGE_THREAD_NEW)
		say(type, tid, cpu, front, now);
}

static __always_inline void tell_idle(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);

	if (c->idle || c->taken)
		return;
	c->idle = 1;
	say(MESSAGE_CPU_IDLE, NOBODY, cpu, 0, now);
}

/* No higher class has the CPU any more. */
static __always_inline void back(u32 cpu, u64 now)
{
	if (!cpu_at(cpu)->taken)
		return;
	cpu_at(cpu)->taken = 0;
	say(MESSAGE_CPU_BACK, NOBODY, cpu, 0, now);
}

/* What became of a decision. */
static __noinline void answer(struct decision *d, u32 cpu, u64 what, u64 now)
{
	struct wave_outcome *o;
	u64 kind = what;

	bounded(kind, 16);
	host.outcomes[kind]++;
	if (what == OUTCOME_COMMITTED && d->type == DECISION_RUN) {
		if (d->flags & DECISION_KICKED) {
			count(host.round_trip, d->basis_ns, now);
			count(host.enforced, d->decided_ns, now);
		} else {
			count(host.age, d->basis_ns, now);
		}
	}
	o = (struct wave_outcome *)claim();
	if (!o)
		return;
	o->seq = d->tid >= 0 && d->tid < THREADS ? thread_at(d->tid)->seq : 0;
	o->time_ns = now;
	o->tid = d->tid;
	o->cpu = cpu;
	o->request_class = 0;
	o->qos = 0;
	o->outcome = what;
	o->front = 0;
	o->cpu_seq = cpu_at(cpu)->seq;
	o->txn = d->txn;
	o->age_ns = now > d->basis_ns ? now - d->basis_ns : 0;
	o->ran_ns = 0;
	publish((struct wave_message *)o, MESSAGE_TXN_OUTCOME);
}

/* ── agent to host ─────────────────────────────────────────────────────────────────────────────────────────────────── */

/* Whether a decision to run a thread holds on that CPU now. */
static __always_inline u32 judge(struct decision *d, u32 cpu)
{
	struct cpu *c = cpu_at(cpu);
	struct thread *t;

	if (d->type != DECISION_RUN || (d->flags & DECISION_PREEMPT && d->cpu_seq != c->seq))
		return OUTCOME_STALE;
	t = thread_at(d->tid);
	if (t->state == ABSENT) /* one that is about to end needs a CPU for that, like any other */
		return OUTCOME_TARGET_GONE;
	if (t->seq != d->seq)
		return OUTCOME_STALE;
	if (t->state == BLOCKED)
		return OUTCOME_TARGET_NOT_RUNNABLE;
	if (t->state == RUNNING)
		return OUTCOME_TARGET_ON_CPU;
	if (!((t->allowed[(cpu >> 6) & (CPUS / 64 - 1)] >> (cpu & 63)) & 1))
		return OUTCOME_CPU_UNAVAILABLE;
	return OUTCOME_COMMITTED;
}

/* The decision at the head of the CPU's queue. */
static __always_inline struct decision *head_of(struct cpu *c)
{
	u64 at = c->head;

	bounded(at, STAGED);
	return &c->queue[at];
}

static __always_inline void drop_head(struct cpu *c)
{
	c->head++;
	c->staged--;
}

/* The first decision of the CPU's queue that holds, still queued; what stands before it is refused. NULL: none. */
static __noinline struct decision *first(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);

	for (u32 i = zero; i < STAGED && can_loop; i++) {
		struct decision *d;
		u32 verdict;

		if (!c->staged)
			break;
		d = head_of(c);
		verdict = judge(d, cpu);
		if (verdict == OUTCOME_COMMITTED)
			return d;
		drop_head(c);
		if (d->type != DECISION_DEMOTE) /* of a thread that has left; it has no outcome */
			answer(d, cpu, verdict, now);
	}
	return NULL;
}

/* The thread is the CPU's from now on. */
static __always_inline void place(s32 tid, u32 cpu)
{
	struct cpu *c = cpu_at(cpu);
	struct thread *t = thread_at(tid);

	t->seq++;
	t->state = RUNNING;
	t->cpu = cpu;
	c->seq++;
	c->running = tid;
	c->stray = NOBODY;
	c->idle = 0;
	c->deviates = 0;
}

/* The decision at the head of the queue, which `first` returned, takes effect. */
static __always_inline void commit(struct decision *d, u32 cpu, u64 now)
{
	drop_head(cpu_at(cpu));
	place(d->tid, cpu);
	answer(d, cpu, OUTCOME_COMMITTED, now);
}

/* Nothing is decided, and the kernel runs the thread: so be it, and the agent is told. */
static __always_inline void accept(s32 tid, u32 cpu, u64 now)
{
	place(tid, cpu);
	tell(MESSAGE_THREAD_RUNNING, tid, cpu, 0, now);
}

/* The thread that was committed to the CPU leaves it. `type`: MESSAGE_THREAD_BLOCKED, _PREEMPTED, _YIELDED or _DEAD. */
static __noinline void vacate(u32 cpu, u32 type, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	s32 tid = c->running;
	struct thread *t;

	if (tid < 0)
		return;
	t = thread_at(tid);
	c->running = NOBODY;
	c->seq++;
	t->seq++;
	t->state = type == MESSAGE_THREAD_BLOCKED ? BLOCKED : type == MESSAGE_THREAD_DEAD ? ABSENT : RUNNABLE;
	if (t->state != RUNNABLE)
		t->demoted = 0;
	tell(type, tid, cpu, 0, now);
	if (type == MESSAGE_THREAD_BLOCKED)
		t->ran_ns = 0;
}

/* A thread that is not committed anywhere changes its state. */
static __always_inline void change(s32 tid, u32 state, u32 type, u32 cpu, u64 now)
{
	struct thread *t = thread_at(tid);

	t->seq++;
	t->state = state;
	if (state != RUNNABLE)
		t->demoted = 0;
	tell(type, tid, cpu, 0, now);
	if (state == BLOCKED)
		t->ran_ns = 0;
}

/* Take in what the agent decided, at most DRAIN decisions; each goes into its CPU's queue, or is refused. Returns how many. */
static __noinline u32 drain(u64 now)
{
	u64 before = host.down_next;

	for (u32 i = zero; i < DRAIN && can_loop; i++) {
		u32 mark = (host.generation << 16) + (u32)(host.down_next >> TXNS_SHIFT) + 1;
		u64 at = host.down_next, word, number;
		struct wave_decision *from;
		struct decision d;
		struct cpu *c;

		if (!host.live)
			break;
		bounded(at, TXNS);
		from = &txns.slot[at];
		word = *(volatile u64 *)from;
		if ((u32)word != mark)
			break;
		full_barrier();
		d.type = word >> 48;
		d.seq = from->seq;
		d.basis_ns = from->time_ns;
		d.decided_ns = from->decided_ns;
		d.txn = from->txn;
		d.tid = from->tid;
		d.flags = from->flags & (DECISION_PREEMPT | DECISION_KICKED); /* the rest is the mechanism's own */
		d.cpu_seq = from->cpu_seq;
		number = (u32)from->cpu;
		host.down_next++;
		if (host.down_next - host.down_credit >= TXNS / 4) {
			host.down_credit = host.down_next;
			full_barrier();
			*(volatile u64 *)&txns.header[RING_CREDIT_AT] = host.down_credit;
		}
		host.decisions++;
		if (((word >> 32) & 0xff) != WAVE_VERSION || ((word >> 40) & 0xff) != WAVE_SUBSYSTEM_SCHED || d.type < DECISION_RUN || d.type > DECISION_DEMOTE) {
			answer(&d, 0, OUTCOME_INVALID, now);
			continue;
		}
		if (number >= host.cpus || !cpu_at(number)->present) {
			answer(&d, 0, OUTCOME_NOT_IN_ENCLAVE, now);
			continue;
		}
		c = cpu_at(number);
		if (d.flags & DECISION_KICKED)
			c->rung = 1;
		if (d.type == DECISION_KICK)
			continue;
		if (d.type == DECISION_YIELD_CPU || d.type == DECISION_DEMOTE)
			d.tid = NOBODY;
		else if (d.tid < 0 || d.tid >= THREADS || !thread_at(d.tid)->pid) {
			answer(&d, number, d.tid < 0 || d.tid >= THREADS ? OUTCOME_INVALID : OUTCOME_NOT_IN_ENCLAVE, now);
			continue;
		}
		if (c->staged >= STAGED) {
			answer(&d, number, OUTCOME_CONGESTED, now);
			continue;
		}
		at = c->head + c->staged;
		bounded(at, STAGED);
		c->queue[at] = d;
		c->staged++;
	}
	return host.down_next - before;
}

/* The doorbell rang: a preemption in the CPU's queue that holds is taken up, demotions before it as well. True if the thread that runs there is to leave for
 * what is then staged. */
static __noinline bool take_up(u32 cpu, u64 now)
{
	struct cpu *c = cpu_at(cpu);
	struct decision kept;
	u32 verdict;

	for (u32 i = zero; i < STAGED && can_loop; i++) {
		u32 staged = c->staged, found;
		u64 at = 0;

		for (found = zero; found < STAGED && found < staged && can_loop; found++) {
			at = c->head + found;
			bounded(at, STAGED);
			if (c->queue[at].flags & DECISION_PREEMPT)
				break;
		}
		if (found >= STAGED || found >= staged)
			return false;
		bounded(at, STAGED);
		kept = c->queue[at];
		verdict = kept.cpu_seq != c->seq || c->running < 0 ? OUTCOME_STALE : kept.type == DECISION_RUN ? judge(&kept, cpu) : OUTCOME_COMMITTED;
		if (verdict == OUTCOME_COMMITTED && kept.type == DECISION_RUN) {
			for (u32 k = zero; k < found && can_loop; k++) { /* what was staged before it is overtaken */
				answer(head_of(c), cpu, OUTCOME_SUPERSEDED, now);
				drop_head(c);
			}
			head_of(c)->flags &= ~DECISION_PREEMPT; /* it holds; the switch that follows commits it */
			return true;
		}
		for (u32 k = found; k > 0 && can_loop; k--) { /* it leaves the queue: those before it move up */
			u64 to = c->head + k, from_at = to - 1;

			bounded(to, STAGED);
			bounded(from_at, STAGED);
			c->queue[to] = c->queue[from_at];
		}
		drop_head(c);
		if (kept.type == DECISION_DEMOTE) {
			if (verdict == OUTCOME_COMMITTED)
				thread_at(c->running)->demoted = 1;
			continue;
		}
		answer(&kept, cpu, verdict, now);
		if (verdict == OUTCOME_COMMITTED)
			return true;
	}
	return false;
}

/* ── what hostd asks for, as SEC("syscall") programs of each mechanism ─────────────────────────────────────────────── */

/* A new agent: the rings are empty (hostd has zeroed their memory), everything staged is forgotten, the replay begins. Takes the lock. */
static __always_inline void begin(u32 generation, u64 now)
{
	bpf_spin_lock(&lock);
	host.up_next = host.up_credit = host.down_next = host.down_credit = 0;
	host.generation = generation;
	host.lost = 1; /* until then: what another CPU meets meanwhile is told as part of the state, after RESYNC */
	host.live = 1;
	bpf_spin_unlock(&lock);
	__sync_lock_test_and_set(&messages.header[RING_IDENTITY_AT],
				 (u64)RING_MAGIC << 48 | (u64)WAVE_VERSION << 40 | (u64)WAVE_SUBSYSTEM_SCHED << 32 | (u64)MESSAGES_SHIFT << 24 | generation);
	__sync_lock_test_and_set(&txns.header[RING_IDENTITY_AT],
				 (u64)RING_MAGIC << 48 | (u64)WAVE_VERSION << 40 | (u64)WAVE_SUBSYSTEM_SCHED << 32 | (u64)TXNS_SHIFT << 24 | generation);
}

/* The agent is gone: what it staged will not be done. Takes the lock. */
static __always_inline void end(void)
{
	u32 cpu;

	bpf_spin_lock(&lock);
	host.fallbacks += host.live; /* else the mechanism has seen its silence, and counted */
	host.live = 0;
	bpf_spin_unlock(&lock);
	messages.header[RING_IDENTITY_AT] = 0;
	txns.header[RING_IDENTITY_AT] = 0;
	bpf_for(cpu, 0, host.cpus) {
		bpf_spin_lock(&lock);
		host.outcomes[OUTCOME_AGENT_LOST] += cpu_at(cpu)->staged;
		cpu_at(cpu)->staged = 0;
		cpu_at(cpu)->rung = cpu_at(cpu)->deviates = 0;
		bpf_spin_unlock(&lock);
	}
}

/* Replay the whole state: from thread `from` on (0: RESYNC and the CPUs first), as far as the ring has room. Returns where to go on, or THREADS when
 * all is said. Events in between introduce their thread themselves. Takes the lock. */
static __always_inline u32 replay(u32 from, u64 now)
{
	u32 cpu, tid;

	if (from == 0) {
		bpf_spin_lock(&lock);
		host.lost = 0;
		host.epoch++;
		say(MESSAGE_RESYNC, NOBODY, NOBODY, 0, now);
		bpf_spin_unlock(&lock);
		bpf_for(cpu, 0, host.cpus) {
			struct cpu *c = cpu_at(cpu);

			bpf_spin_lock(&lock);
			c->staged = 0;
			c->rung = c->deviates = c->idle = 0;
			if (c->running >= 0) {
				thread_at(c->running)->demoted = 0; /* the new agent's policy knows nothing of it */
				tell(MESSAGE_THREAD_NEW, c->running, NOBODY, 0, now);
			}
			say(MESSAGE_CPU_NEW, c->running, cpu, 0, now);
			if (c->taken)
				say(MESSAGE_CPU_TAKEN, NOBODY, cpu, 0, now);
			else if (c->running < 0)
				tell_idle(cpu, now);
			bpf_spin_unlock(&lock);
		}
	}
	bpf_for(tid, from, THREADS) {
		struct thread *t = thread_at(tid);
		u32 room;

		if (t->state == ABSENT)
			continue;
		bpf_spin_lock(&lock);
		room = !host.lost && host.up_next - *(volatile u64 *)&messages.header[RING_CREDIT_AT] + 64 < MESSAGES;
		if (room && t->state != ABSENT && t->epoch != host.epoch) {
			t->demoted = 0;
			tell(MESSAGE_THREAD_NEW, tid, NOBODY, 0, now);
			if (t->state == RUNNABLE)
				say(MESSAGE_THREAD_RUNNABLE, tid, NOBODY, 0, now);
		}
		bpf_spin_unlock(&lock);
		if (!room)
			return tid;
	}
	return THREADS;
}

struct adopt {
	u32 pid;
	u32 tid;
	u64 seq;
	u64 allowed[CPUS / 64];
};

/* A thread joins under a number that hostd chose. Until the first event shows its state it counts as blocked. */
SEC("syscall")
int adopt(struct adopt *a)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = thread_at(a->tid);

	bpf_spin_lock(&lock);
	t->pid = a->pid;
	t->state = BLOCKED;
	t->dying = t->demoted = t->lowered = 0;
	t->cpu = NOBODY;
	t->ran_ns = 0;
	t->since_ns = now; /* it may be on a CPU as it joins */
	t->epoch = 0;
	for (int i = 0; i < CPUS / 64; i++)
		t->allowed[i] = a->allowed[i];
	t->seq++;
	tell(MESSAGE_THREAD_NEW, a->tid, NOBODY, 0, now);
	bpf_spin_unlock(&lock);
	return 0;
}

/* The thread was seen waiting for a CPU, and nothing has happened to it since its sequence number was `seq`. */
SEC("syscall")
int seen_runnable(struct adopt *a)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = thread_at(a->tid);

	bpf_spin_lock(&lock);
	if (t->pid == a->pid && t->state == BLOCKED && t->seq == a->seq)
		change(a->tid, RUNNABLE, MESSAGE_THREAD_RUNNABLE, NOBODY, now);
	bpf_spin_unlock(&lock);
	return 0;
}

/* A thread leaves the enclave and lives on. */
SEC("syscall")
int release(struct adopt *a)
{
	u64 now = bpf_ktime_get_ns();
	struct thread *t = thread_at(a->tid);

	bpf_spin_lock(&lock);
	if (t->pid == a->pid && t->state != ABSENT) {
		if (t->state == RUNNING)
			vacate(t->cpu, MESSAGE_THREAD_DEAD, now);
		else
			change(a->tid, ABSENT, MESSAGE_THREAD_DEAD, NOBODY, now);
	}
	unstray(a->tid);
	t->pid = 0;
	bpf_spin_unlock(&lock);
	return 0;
}

struct replay_at {
	u32 generation; /* not 0: a new agent */
	u32 from;
};

SEC("syscall")
int start(struct replay_at *a)
{
	begin(a->generation, bpf_ktime_get_ns());
	return 0;
}

SEC("syscall")
int stop(void *context)
{
	end();
	return 0;
}

SEC("syscall")
int resync(struct replay_at *a)
{
	return replay(a->from, bpf_ktime_get_ns());
}

/* ── births and deaths ─────────────────────────────────────────────────────────────────────────────────────────────── */

/* A child of a member is born outside: its priority was reset on fork. hostd takes it in, after writing down what it was. Until then it is marked, so that
 * its own children are heard of, too. */
SEC("tp_btf/sched_process_fork")
int BPF_PROG(on_fork, struct task_struct *parent, struct task_struct *child)
{
	struct member coming = {.tid = COMING};

	if (!bpf_task_storage_get(&members, parent, 0, 0))
		return 0;
	bpf_task_storage_get(&members, child, &coming, BPF_LOCAL_STORAGE_GET_F_CREATE);
	notify_from(EVENT_FORK, child->pid, NOBODY, parent->pid); /* once the parent has ended, /proc names another */
	return 0;
}

SEC("tp_btf/sched_process_exit")
int BPF_PROG(on_exit, struct task_struct *task)
{
	s32 tid = member_of(task);

	if (tid < 0)
		return 0;
	bpf_spin_lock(&lock);
	thread_at(tid)->dying = 1;
	bpf_spin_unlock(&lock);
	notify(EVENT_GONE, task->pid, tid);
	return 0;
}

/* A thread that is not the first of its process executes a program: it is the only one that is left, under the first one's number. */
SEC("tp_btf/sched_process_exec")
int BPF_PROG(on_exec, struct task_struct *task, s32 old_pid)
{
	s32 tid = member_of(task);

	if (task->pid == old_pid || tid == NOBODY)
		return 0;
	if (tid == COMING) { /* it was to be taken in under a number that is nobody's now */
		notify_from(EVENT_FORK, task->pid, NOBODY, old_pid);
		return 0;
	}
	bpf_spin_lock(&lock);
	thread_at(tid)->pid = task->pid;
	bpf_spin_unlock(&lock);
	notify_from(EVENT_EXEC, task->pid, tid, old_pid);
	return 0;
}
