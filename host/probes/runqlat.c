// How long a thread that could run waits for a CPU: from being queued (woken, preempted, yielded) until it is switched to.

BPF_HASH(queued_at, u32, u64, THREADS);  // 0: does not wait
BPF_PERCPU_ARRAY(waits, struct tally, 1);

static __always_inline int queue(u32 thread)
{
	u64 now = bpf_ktime_get_ns();
	u64 *at = queued_at.lookup(&thread);
	if (at)
		*at = now;
	else if (queued_at.update(&thread, &now))
		lose();
	return 0;
}

TRACEPOINT_PROBE(sched, sched_wakeup)
{
	return counts(args->pid) ? queue(args->pid) : 0;
}

TRACEPOINT_PROBE(sched, sched_wakeup_new)
{
	return counts(args->pid) ? queue(args->pid) : 0;
}

TRACEPOINT_PROBE(sched, sched_switch)
{
	u32 left = args->prev_pid, next = args->next_pid;
	long state = args->prev_state;
	u64 *at, waited;
	int only = 0;
	struct tally *tally;

	if (counts(left)) {
		if (RUNNABLE(state)) {
			queue(left);
		} else if (state & DEAD) {
			queued_at.delete(&left);
			forget(left);
		} else {
			at = queued_at.lookup(&left);
			if (at)
				*at = 0;  // woken before it had gone to sleep: it never waited
		}
	}
	at = queued_at.lookup(&next);
	if (!at || !*at)
		return 0;
	waited = bpf_ktime_get_ns() - *at;
	*at = 0;
	tally = waits.lookup(&only);
	if (tally && CPU_COUNTS(bpf_get_smp_processor_id())) {
		add(tally, waited);
		record(waited);
	}
	return 0;
}
