// Context switches of each CPU: voluntary (the thread that leaves it sleeps) or not (it could have gone on), as the kernel itself counts them.

#define KINDS 2

BPF_PERCPU_ARRAY(switches, u64, KINDS);

TRACEPOINT_PROBE(sched, sched_switch)
{
	u32 left = args->prev_pid;
	long state = args->prev_state;
	int kind = RUNNABLE(state);
	u64 *times;

	if (!counts(left))
		return 0;
	if (state & DEAD)
		forget(left);
	times = CPU_COUNTS(bpf_get_smp_processor_id()) ? switches.lookup(&kind) : NULL;
	if (times)
		*times += 1;
	return 0;
}
