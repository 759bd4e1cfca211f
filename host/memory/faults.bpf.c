/* Counts page faults of the enclave's processes by page batch, where user space has said that it watches: waveos.host.memory.faults.
 *
 * A count only grows, and user space keeps what it has seen of it, so neither side ever clears what the other writes.
 */
#include "kernel.h"

#define PLACES 16
#define BATCHES 16384

struct place { /* a region: batches [0, batches) of 1 << shift bytes each, from `start` on, in the process `tgid` */
	u64 start;
	u32 tgid; /* 0: the place is free */
	u32 batches;
	u32 shift;
	u32 spare;
};

struct place places[PLACES] SEC(".bss.places");
u32 counts[PLACES][BATCHES] SEC(".bss.counts");

SEC("tp_btf/page_fault_user")
int BPF_PROG(on_fault, unsigned long address, void *regs, unsigned long error)
{
	u32 tgid = bpf_get_current_pid_tgid() >> 32;

	for (u32 i = 0; i < PLACES; i++) {
		struct place *at = &places[i];
		u64 batch;

		if (at->tgid != tgid || address < at->start)
			continue;
		batch = (address - at->start) >> (at->shift & 63);
		if (batch < at->batches && batch < BATCHES)
			__sync_fetch_and_add(&counts[i][batch & (BATCHES - 1)], 1);
	}
	return 0;
}

char _license[] SEC("license") = "Dual BSD/GPL";
