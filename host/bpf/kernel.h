/* What BPF programs here need of the kernel, and no more: the few fields they use, found by name on the kernel that loads them (CO-RE).
 *
 * A struct holds only the fields that are read, in any order; on load each access is moved to where the field is there. No vmlinux.h: what
 * depends on the kernel is all on this page.
 */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>
#include <linux/version.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0) /* of the headers here, not of the kernel that runs: bpf_for wants the whole type */
struct bpf_iter_num {
	__u64 opaque[1];
} __attribute__((aligned(8)));
#endif

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct cpumask {
	unsigned long bits[4]; /* the kernel's own length differs: only ever passed on */
};

struct task_struct {
	int pid;  /* the thread's; user space's tid */
	int tgid; /* the process's; user space's pid */
	unsigned int flags;
	unsigned int __state;
	int on_cpu;
	int on_rq;
	int prio;
	int static_prio;
	unsigned int rt_priority;
	unsigned int policy;
	int nr_cpus_allowed;
	const struct cpumask *cpus_ptr;
	u64 start_time;
	int exit_code;
	char comm[16];
	struct task_struct *group_leader;
	struct task_struct *real_parent;
};

#pragma clang attribute pop
