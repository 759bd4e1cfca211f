// Why a thread is not on a CPU and for how long: asleep in a state until it is woken, then waiting for a CPU; or preempted.

#define WOKEN 0x200  // a reason of our own beside the kernel's states

struct absence {
	u64 since;  // 0: it is on a CPU, or left one that does not count
	u64 woken_at;
	u64 state;
	char name[16];
};
struct reason {
	char name[16];
	u64 state;
};

BPF_ARRAY(began_at, u64, 1);  // what was before does not count
BPF_HASH(absences, u32, struct absence, THREADS);
BPF_PERCPU_HASH(times, struct reason, struct tally, 16384);

static __always_inline void spend(struct reason *reason, u64 from, u64 to)
{
	struct tally nothing = {}, *tally;
	int only = 0;
	u64 *began = began_at.lookup(&only);
	if (began && from < *began)
		from = *began;
	if (to <= from)
		return;
	tally = times.lookup_or_try_init(reason, &nothing);
	if (tally)
		add(tally, to - from);
	else
		lose();
}

static __always_inline void wake(u32 thread)
{
	struct absence *absence = absences.lookup(&thread);
	if (absence && absence->since && !absence->woken_at)
		absence->woken_at = bpf_ktime_get_ns();
}

TRACEPOINT_PROBE(sched, sched_wakeup)
{
	wake(args->pid);
	return 0;
}

TRACEPOINT_PROBE(sched, sched_switch)
{
	u32 left = args->prev_pid, next = args->next_pid;
	u64 now = bpf_ktime_get_ns(), state = args->prev_state, woken_at;
	struct absence *absence, gone = {.since = now, .state = RUNNABLE(state) ? 0 : state};
	struct reason reason = {};

	if (counts(left)) {
		if (state & DEAD) {
			absences.delete(&left);
			forget(left);
		} else if (CPU_COUNTS(bpf_get_smp_processor_id())) {
			bpf_probe_read_kernel(&gone.name, sizeof(gone.name), args->prev_comm);
			absence = absences.lookup(&left);
			if (absence)
				*absence = gone;
			else if (absences.update(&left, &gone))
				lose();
		}
	}
	absence = absences.lookup(&next);
	if (!absence || !absence->since)
		return 0;
	__builtin_memcpy(&reason.name, &absence->name, sizeof(reason.name));
	reason.state = absence->state;
	woken_at = absence->woken_at;
	spend(&reason, absence->since, woken_at ? woken_at : now);
	if (woken_at) {
		reason.state = WOKEN;
		spend(&reason, woken_at, now);
	}
	absence->since = 0;
	return 0;
}
