/* A struct_ops that no kernel has. */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct wave_no_such_ops {
	int (*decide)(void);
};

SEC("struct_ops")
int BPF_PROG(decide)
{
	return 0;
}

SEC(".struct_ops.link")
struct wave_no_such_ops ops = {.decide = (void *)decide};
