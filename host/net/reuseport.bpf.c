/* Which of the sockets that share a port (SO_REUSEPORT) gets a datagram or connection: the steering table says, which user space writes.
 *
 * A flow's hash picks an entry, the entry names a worker, the worker has a socket. Where no worker is named, or it has no socket any more, the kernel
 * chooses by its own hash, as without this program.
 */
#include <linux/bpf.h>

#include <bpf/bpf_helpers.h>

#define ENTRIES 256
#define WORKERS 64
#define KERNELS_CHOICE 0xffffffff

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, ENTRIES);
	__type(key, __u32);
	__type(value, __u64);
} table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_REUSEPORT_SOCKARRAY);
	__uint(max_entries, WORKERS);
	__type(key, __u32);
	__type(value, __u64);
} workers SEC(".maps");

struct counters {
	__u64 steered;
	__u64 left; /* to the kernel's choice */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

SEC("sk_reuseport")
int choose(struct sk_reuseport_md *ctx)
{
	__u32 entry = ctx->hash % ENTRIES, zero = 0;
	__u64 *named = bpf_map_lookup_elem(&table, &entry);
	struct counters *c = bpf_map_lookup_elem(&counters, &zero);

	if (!named || !c)
		return SK_PASS;

	__u32 worker = *named;

	if (worker != KERNELS_CHOICE && bpf_sk_select_reuseport(ctx, &workers, &worker, 0) == 0)
		__sync_fetch_and_add(&c->steered, 1);
	else
		__sync_fetch_and_add(&c->left, 1);
	return SK_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
