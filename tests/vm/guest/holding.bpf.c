/* A scheduler that holds what becomes runnable until it is told where to run it; it calls all of scx.h, so each kernel that loads it fits that header. */
#include "scx.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define HELD 9

struct told {
	u64 holding; /* user space's: 1: hold; 0: first come, first served */
	u32 pid;     /* whom `give` gives a CPU */
	u32 cpu;
	u32 preempt;
	u32 kick;
};
struct seen {
	u64 enqueued;
	u64 ran;
	u64 stopped;
	u64 dispatches[64]; /* by CPU */
	u64 ticks;          /* of the timer */
	u64 switches;
	u64 yields;
	u64 kicks;
	u64 masks;
	u64 at_head;
	u64 left;
	u64 exit_kind;
};
struct told told SEC(".bss.told");
struct seen seen SEC(".bss.seen");

static struct bpf_spin_lock lock SEC(".bss.lock");

struct member {
	u64 n;
};
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct member);
} members SEC(".maps");

struct timed {
	struct bpf_timer timer;
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct timed);
} timers SEC(".maps");

/* Every event takes the one lock: operations, timer, tracepoint and program called from user space. */
#define count(field) \
	do { \
		bpf_spin_lock(&lock); \
		seen.field++; \
		bpf_spin_unlock(&lock); \
	} while (0)

SEC("tp_btf/sched_switch")
int BPF_PROG(on_switch, bool preempt, struct task_struct *prev, struct task_struct *next)
{
	struct member *m = bpf_task_storage_get(&members, next, 0, 0);

	if (m)
		count(switches);
	return 0;
}

static int look(void *map, u32 *key, struct timed *t)
{
	count(ticks);
	bpf_timer_start(&t->timer, 5000000, 0);
	return 0;
}

/* Give `told.pid`, which is held, the CPU `told.cpu`. 1: it waited and is given; 0: it did not wait. */
SEC("syscall")
int give(void *context)
{
	u64 flags = told.preempt ? enq_flag(SCX_ENQ_PREEMPT) : 0;
	struct task_struct *p = bpf_task_from_pid(told.pid);
	bool given;

	if (!p)
		return 0;
	given = move(p, HELD, SCX_DSQ_LOCAL_ON | told.cpu, SCX_SLICE_INF, flags);
	bpf_task_release(p);
	if (given && told.kick)
		kick(told.cpu, told.preempt ? SCX_KICK_PREEMPT : 0);
	return given;
}

/* 1: the kernel can kick from BPF, and did. */
SEC("syscall")
int kick_it(void *context)
{
	count(kicks);
	return kick(told.cpu, 0);
}

SEC("struct_ops/select_cpu")
s32 BPF_PROG(holding_select_cpu, struct task_struct *p, s32 prev_cpu, u64 wake_flags)
{
	return prev_cpu;
}

SEC("struct_ops/enqueue")
void BPF_PROG(holding_enqueue, struct task_struct *p, u64 enq_flags)
{
	struct member *m = bpf_task_storage_get(&members, p, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (m)
		m->n++;
	count(enqueued);
	if (enq_flags & enq_flag(SCX_ENQ_HEAD))
		count(at_head);
	insert(p, HELD, SCX_SLICE_INF, enq_flags);
}

SEC("struct_ops/dispatch")
void BPF_PROG(holding_dispatch, s32 cpu, struct task_struct *prev)
{
	u64 at = cpu;

	bpf_spin_lock(&lock);
	if (at < 64)
		seen.dispatches[at]++;
	bpf_spin_unlock(&lock);
	if (prev && queued(prev) && told.holding)
		return;
	if (!told.holding)
		to_local(HELD);
}

SEC("struct_ops/running")
void BPF_PROG(holding_running, struct task_struct *p)
{
	count(ran);
}

SEC("struct_ops/stopping")
void BPF_PROG(holding_stopping, struct task_struct *p, bool runnable)
{
	count(stopped);
}

SEC("struct_ops/yield")
bool BPF_PROG(holding_yield, struct task_struct *from, struct task_struct *to)
{
	count(yields);
	set_slice(from, 0);
	return false;
}

SEC("struct_ops/set_cpumask")
void BPF_PROG(holding_set_cpumask, struct task_struct *p, const struct cpumask *mask)
{
	if (bpf_cpumask_test_cpu(0, mask))
		count(masks);
}

SEC("struct_ops/disable")
void BPF_PROG(holding_disable, struct task_struct *p)
{
	count(left);
}

SEC("struct_ops.s/init")
s32 BPF_PROG(holding_init)
{
	struct timed *t;
	u32 key = 0;

	t = bpf_map_lookup_elem(&timers, &key);
	if (!t)
		return -1;
	bpf_timer_init(&t->timer, &timers, 1 /* CLOCK_MONOTONIC */);
	bpf_timer_set_callback(&t->timer, look);
	bpf_timer_start(&t->timer, 5000000, 0);
	return make_queue(HELD);
}

SEC("struct_ops/exit")
void BPF_PROG(holding_exit, struct scx_exit_info *info)
{
	seen.exit_kind = info->kind;
}

SEC(".struct_ops.link")
struct sched_ext_ops holding_ops = {
	.select_cpu = (void *)holding_select_cpu,
	.enqueue = (void *)holding_enqueue,
	.dispatch = (void *)holding_dispatch,
	.running = (void *)holding_running,
	.stopping = (void *)holding_stopping,
	.yield = (void *)holding_yield,
	.set_cpumask = (void *)holding_set_cpumask,
	.disable = (void *)holding_disable,
	.init = (void *)holding_init,
	.exit = (void *)holding_exit,
	.flags = SCX_OPS_SWITCH_PARTIAL | SCX_OPS_ENQ_LAST,
	.timeout_ms = 30000,
	.name = "holding",
};
