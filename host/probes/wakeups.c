// Who wakes whom, and how long the woken then takes to run: from the waking, on the waker's CPU, until the woken is switched to.

struct pair {
	char waker[16];
	char woken[16];
};
struct waking {
	u64 at;  // 0: it has run since
	struct pair pair;
};
struct wakings {
	u64 wakings;
	struct tally runs;
};

BPF_HASH(wakings_of, u32, struct waking, THREADS);
BPF_PERCPU_HASH(pairs, struct pair, struct wakings, 16384);

// An interrupt wakes in the name of whatever it interrupts, so each CPU knows which it is in.
#define TIMER 1
#define IRQ 2
#define SOFTIRQ 4
BPF_PERCPU_ARRAY(interrupts, u64, 1);

static __always_inline u64 interrupt(u64 entered, u64 left)
{
	int only = 0;
	u64 *inside = interrupts.lookup(&only);
	if (!inside)
		return 0;
	*inside = (*inside | entered) & ~left;
	return *inside;
}

#define INTERRUPT(category, name, kind)                                                    \
	TRACEPOINT_PROBE(category, name##_entry) { interrupt(kind, 0); return 0; } \
	TRACEPOINT_PROBE(category, name##_exit) { interrupt(0, kind); return 0; }

INTERRUPT(irq, irq_handler, IRQ)
INTERRUPT(irq, softirq, SOFTIRQ)
#ifdef IRQ_VECTORS  // x86: these are not seen as interrupt handlers; irq_work, which is not either, may not be attached to
INTERRUPT(irq_vectors, local_timer, TIMER)
INTERRUPT(irq_vectors, call_function_single, IRQ)
INTERRUPT(irq_vectors, call_function, IRQ)
#endif

TRACEPOINT_PROBE(sched, sched_waking)
{
	struct waking waking = {.at = bpf_ktime_get_ns()};
	struct wakings none = {}, *wakings;
	u64 inside = interrupt(0, 0);
	u32 woken = args->pid;

	if (!CPU_COUNTS(bpf_get_smp_processor_id()))
		return 0;
	if (!counts(woken) && (inside || !counts((u32)bpf_get_current_pid_tgid())))
		return 0;
	if (inside & TIMER)
		__builtin_memcpy(waking.pair.waker, "[timer]", 8);
	else if (inside & IRQ)
		__builtin_memcpy(waking.pair.waker, "[interrupt]", 12);
	else if (inside)
		__builtin_memcpy(waking.pair.waker, "[softirq]", 10);
	else
		bpf_get_current_comm(&waking.pair.waker, sizeof(waking.pair.waker));
	bpf_probe_read_kernel(&waking.pair.woken, sizeof(waking.pair.woken), args->comm);
	wakings = pairs.lookup_or_try_init(&waking.pair, &none);
	if (wakings)
		wakings->wakings += 1;
	if (!wakings || wakings_of.update(&woken, &waking))
		lose();
	return 0;
}

TRACEPOINT_PROBE(sched, sched_switch)
{
	u32 left = args->prev_pid, next = args->next_pid;
	long state = args->prev_state;
	struct waking *waking;
	struct wakings none = {}, *wakings;
	u64 took;

	if (state & DEAD) {
		wakings_of.delete(&left);
		forget(left);
	} else {
		waking = wakings_of.lookup(&left);
		if (waking)
			waking->at = 0;  // woken while it still ran
	}
	waking = wakings_of.lookup(&next);
	if (!waking || !waking->at)
		return 0;
	took = bpf_ktime_get_ns() - waking->at;
	waking->at = 0;
	wakings = pairs.lookup_or_try_init(&waking->pair, &none);
	if (wakings) {
		add(&wakings->runs, took);
		record(took);
	} else {
		lose();
	}
	return 0;
}
