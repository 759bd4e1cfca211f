// What every probe shares: which threads and which CPUs count. Put before each of them.
//
// Fields of tracepoints and helpers only, never a structure of the kernel's: bcc reads a tracepoint's layout from the running
// kernel, so headers of a neighbouring version serve as well as the kernel's own.

#define BPF_LICENSE Dual BSD/GPL

// prev_state of sched_switch (Linux >= 4.14): whether the thread could have gone on (preempted in the kernel; 0: preempted on its way
// to user mode, or it yielded), else why it sleeps; and a thread's last.
#define RUNNABLE(state) ((state) == 0 || (state) & 0x100)
#define DEAD (0x10 | 0x20)

#define THREADS 65536

struct tally {
	u64 count;
	u64 total_ns;
	u64 max_ns;
};

BPF_PERCPU_ARRAY(lost, u64, 1);  // events for which a table had no room

static __always_inline void lose(void)
{
	int only = 0;
	u64 *events = lost.lookup(&only);
	if (events)
		*events += 1;
}

static __always_inline void add(struct tally *tally, u64 ns)
{
	tally->count += 1;
	tally->total_ns += ns;
	if (ns > tally->max_ns)
		tally->max_ns = ns;
}

#ifdef ONLY_WATCHED
BPF_HASH(watched, u32, u8, THREADS);

static __always_inline int counts(u32 thread)
{
	return watched.lookup(&thread) != NULL;
}

static __always_inline void forget(u32 thread)
{
	watched.delete(&thread);
}

// Whatever a watched thread starts is watched, from before its first step on.
TRACEPOINT_PROBE(sched, sched_process_fork)
{
	u32 parent = args->parent_pid, child = args->child_pid;
	u8 yes = 1;
	if (watched.lookup(&parent) && watched.update(&child, &yes))
		lose();
	return 0;
}
#else
#define counts(thread) ((thread) != 0)
#define forget(thread)
#endif
