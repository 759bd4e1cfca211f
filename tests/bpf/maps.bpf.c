/* For tests of the binding: maps of each kind that is used, rings both ways, programs run by hand and one that is attached. */
#include "kernel.h"
#include "wave_records.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

const volatile u32 step = 1;
const volatile s64 offset = 0;
u64 start_at = 100;

struct shared {
	u64 calls;
	s64 sum;
	struct wave_message last;
};
struct shared shared SEC(".bss.shared") __attribute__((aligned(64)));
u64 wakeups;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1000);
	__type(key, u32);
	__type(value, u32);
} table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, u32);
	__type(value, u64);
} named SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, u32);
	__type(value, u32);
} percpu SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} up SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_USER_RINGBUF);
	__uint(max_entries, 4096);
} down SEC(".maps");

struct request {
	u32 number;
	u32 times;
	s64 answer; /* written by the program */
};

SEC("syscall")
int add(struct request *r)
{
	shared.calls += step;
	shared.sum += r->number;
	r->answer = shared.sum + offset + start_at;
	shared.last.type = MESSAGE_THREAD_DEAD;
	shared.last.ran_ns = r->answer;
	return -(int)r->number;
}

SEC("syscall")
int nothing(void *context)
{
	return 7;
}

SEC("syscall")
int count_here(struct request *r)
{
	u32 key = 1, *value = bpf_map_lookup_elem(&percpu, &key);
	u32 entry = r->number, *at = bpf_map_lookup_elem(&table, &entry);

	if (!value || !at)
		return -1;
	*value += 1;
	*at += 1;
	return *at;
}

/* `times` records of 8 bytes each to the ring, from `number` on; how many found room. */
SEC("syscall")
int say(struct request *r)
{
	u32 i, said = 0;

	bpf_for(i, 0, r->times) {
		u64 word = r->number + i;

		if (!bpf_ringbuf_output(&up, &word, sizeof(word), 0))
			said++;
	}
	return said;
}

static long take(struct bpf_dynptr *record, void *context)
{
	u64 word;

	if (bpf_dynptr_read(&word, sizeof(word), record, 0, 0))
		return 1;
	*(s64 *)context += word;
	return 0;
}

SEC("syscall")
int listen(struct request *r)
{
	s64 sum = 0;
	long taken = bpf_user_ringbuf_drain(&down, take, &sum, 0);

	r->answer = sum;
	return taken;
}

SEC("tp_btf/sched_wakeup")
int BPF_PROG(on_wakeup, struct task_struct *task)
{
	if (task->pid)
		__sync_fetch_and_add(&wakeups, 1);
	return 0;
}
