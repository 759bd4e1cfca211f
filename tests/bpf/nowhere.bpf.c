/* A program for a function that no kernel has, and one that goes anywhere. */
#include "kernel.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

SEC("fentry/wave_no_such_function")
int BPF_PROG(nowhere)
{
	return 0;
}

SEC("syscall")
int anywhere(void *context)
{
	return 1;
}
