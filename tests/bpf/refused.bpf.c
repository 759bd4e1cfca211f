/* The verifier refuses this: memory that may not be read. */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct request {
	u64 address;
};

SEC("syscall")
int wild(struct request *r)
{
	return *(u32 *)r->address;
}
