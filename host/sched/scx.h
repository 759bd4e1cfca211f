/* What of the kernel's sched_ext the mechanism uses: its operations, constants and functions, as declared here and no vmlinux.h.
 *
 * The kernel's functions and some of its numbers change from one version to the next; all that does stands behind a small wrapper
 * below, and what was found to differ between Linux 6.17 and 7.2 is said beside it. A function is declared weak, under a name with a suffix
 * from three underscores on, which libbpf ignores: where the kernel's prototype is another one, it stays unresolved and its branch
 * is never loaded.
 */
#pragma once

#include "kernel.h"

/* ── numbers ───────────────────────────────────────────────────────────────────────────────────────────────────────── */

/* Equal in 6.17 and 7.2. */
#define SCX_SLICE_DFL 20000000ull
#define SCX_SLICE_INF (~0ull) /* no tick ends it: only blocking, a kick with PREEMPT, or `slice` set to 0 */
#define SCX_DSQ_GLOBAL (1ull << 63 | 1)
/* Of the CPU that dispatches; in `enqueue`: of the CPU that `select_cpu` chose. Here and in the next the kernel ends the whole scheduler, with an error, over a
 * thread that may not run on that CPU; `to_local` of a queue of our own passes over it. */
#define SCX_DSQ_LOCAL (1ull << 63 | 2)
#define SCX_DSQ_LOCAL_ON (1ull << 63 | 1ull << 62) /* | CPU */
#define SCX_KICK_IDLE 1ull    /* only if the CPU idles */
#define SCX_KICK_PREEMPT 2ull /* the slice of the thread on it is over; no effect on other classes */
#define SCX_DEQ_SLEEP 1ull
#define SCX_TASK_QUEUED 1u
#define SCX_OPS_ENQ_LAST 2ull
#define SCX_OPS_ENQ_EXITING 4ull
#define SCX_OPS_SWITCH_PARTIAL 8ull

/* Others do change (HEAD was 16 in 6.17 and is 65536 in 7.2): the running kernel is asked for its own. */
enum scx_enq_flags {
	SCX_ENQ_WAKEUP = 1ull,
	SCX_ENQ_HEAD = 1ull << 16,
	SCX_ENQ_CPU_SELECTED = 1ull << 20,
	SCX_ENQ_PREEMPT = 1ull << 32,
	SCX_ENQ_REENQ = 1ull << 40,
	SCX_ENQ_LAST = 1ull << 41,
};
#define enq_flag(name) bpf_core_enum_value(enum scx_enq_flags, name)

enum scx_exit_kind { SCX_EXIT_NONE, SCX_EXIT_DONE, SCX_EXIT_UNREG = 64, SCX_EXIT_ERROR = 1024, SCX_EXIT_ERROR_BPF, SCX_EXIT_ERROR_STALL };
enum scx_cpu_preempt_reason { SCX_CPU_PREEMPT_RT, SCX_CPU_PREEMPT_DL, SCX_CPU_PREEMPT_STOP, SCX_CPU_PREEMPT_UNKNOWN };

/* ── structures ────────────────────────────────────────────────────────────────────────────────────────────────────── */

struct cgroup;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct sched_ext_entity {
	u32 flags;
	u32 weight;
	u64 slice;
};
struct task_struct___scx {
	struct sched_ext_entity scx;
};
struct scx_init_task_args {
	bool fork;
	struct cgroup *cgroup;
};
struct scx_exit_task_args {
	bool cancelled;
};
struct scx_cpu_acquire_args {
};
struct scx_cpu_release_args {
	enum scx_cpu_preempt_reason reason;
	struct task_struct *task; /* who takes the CPU */
};
struct bpf_iter_scx_dsq {
	u64 opaque[6];
} __attribute__((aligned(8)));
struct scx_exit_info {
	enum scx_exit_kind kind;
	s64 exit_code;
	const char *reason;
	char *msg;
};
#pragma clang attribute pop

/* The scheduler's operations: libbpf finds each by its name in the kernel's own structure, so only those that are used stand here, in any order.
 * 7.2 keeps cpu_acquire and cpu_release, at its end, as deprecated. */
struct sched_ext_ops {
	s32 (*select_cpu)(struct task_struct *p, s32 prev_cpu, u64 wake_flags);
	void (*enqueue)(struct task_struct *p, u64 enq_flags);
	void (*dequeue)(struct task_struct *p, u64 deq_flags); /* 6.17: taken out of the scheduler's hands; 7.2: also whenever it is dispatched, once for each `enqueue` */
	void (*dispatch)(s32 cpu, struct task_struct *prev);
	void (*tick)(struct task_struct *p);
	void (*runnable)(struct task_struct *p, u64 enq_flags);
	void (*running)(struct task_struct *p); /* without `enqueue` before it, for a thread that is on a CPU when it joins the class */
	void (*stopping)(struct task_struct *p, bool runnable);
	void (*quiescent)(struct task_struct *p, u64 deq_flags);
	bool (*yield)(struct task_struct *from, struct task_struct *to);
	void (*set_weight)(struct task_struct *p, u32 weight);
	void (*set_cpumask)(struct task_struct *p, const struct cpumask *cpumask);
	void (*update_idle)(s32 cpu, bool idle);
	void (*cpu_acquire)(s32 cpu, struct scx_cpu_acquire_args *args);
	void (*cpu_release)(s32 cpu, struct scx_cpu_release_args *args);
	s32 (*init_task)(struct task_struct *p, struct scx_init_task_args *args);
	void (*exit_task)(struct task_struct *p, struct scx_exit_task_args *args);
	void (*enable)(struct task_struct *p);
	void (*disable)(struct task_struct *p);
	void (*cpu_online)(s32 cpu);
	void (*cpu_offline)(s32 cpu);
	s32 (*init)(void);
	void (*exit)(struct scx_exit_info *info);
	u32 dispatch_max_batch;
	u64 flags;
	u32 timeout_ms;
	char name[128];
};

/* ── functions ─────────────────────────────────────────────────────────────────────────────────────────────────────── */

struct task_struct *bpf_task_from_pid(s32 pid) __weak __ksym;
void bpf_task_release(struct task_struct *p) __weak __ksym;
void bpf_rcu_read_lock(void) __weak __ksym;
void bpf_rcu_read_unlock(void) __weak __ksym;
bool bpf_cpumask_test_cpu(u32 cpu, const struct cpumask *mask) __weak __ksym;

s32 scx_bpf_create_dsq(u64 queue, s32 node) __weak __ksym;
s32 scx_bpf_dsq_nr_queued(u64 queue) __weak __ksym;
s32 scx_bpf_select_cpu_dfl___v1(struct task_struct *p, s32 prev_cpu, u64 wake_flags, bool *is_idle) __weak __ksym;
s32 scx_bpf_task_cpu(const struct task_struct *p) __weak __ksym;
bool scx_bpf_task_running(const struct task_struct *p) __weak __ksym;
void scx_bpf_dsq_insert___v1(struct task_struct *p, u64 queue, u64 slice_ns, u64 enq_flags) __weak __ksym;
bool scx_bpf_dsq_move_to_local___v1(u64 queue) __weak __ksym;
int bpf_iter_scx_dsq_new(struct bpf_iter_scx_dsq *it, u64 queue, u64 flags) __weak __ksym;
struct task_struct *bpf_iter_scx_dsq_next(struct bpf_iter_scx_dsq *it) __weak __ksym;
void bpf_iter_scx_dsq_destroy(struct bpf_iter_scx_dsq *it) __weak __ksym;
void scx_bpf_dsq_move_set_slice___v1(struct bpf_iter_scx_dsq *it, u64 slice_ns) __weak __ksym;
bool scx_bpf_dsq_move___v1(struct bpf_iter_scx_dsq *it, struct task_struct *p, u64 queue, u64 enq_flags) __weak __ksym;
void scx_bpf_kick_cpu___v1(s32 cpu, u64 flags) __weak __ksym;

/* A queue of the scheduler's own, served in the order of arrival. Only in `init` (SEC("struct_ops.s/init")). */
static __always_inline s32 make_queue(u64 queue)
{
	return scx_bpf_create_dsq(queue, -1);
}

/* Put a thread into a queue. In `enqueue` (and `select_cpu`): only the thread in question; in `dispatch`: any that waits. */
static __always_inline void insert(struct task_struct *p, u64 queue, u64 slice_ns, u64 enq_flags)
{
	scx_bpf_dsq_insert___v1(p, queue, slice_ns, enq_flags);
}

/* Only in `dispatch`: the first thread of the queue that may run here comes to this CPU. False: there was none. */
static __always_inline bool to_local(u64 queue)
{
	return scx_bpf_dsq_move_to_local___v1(queue);
}

/* From `dispatch`, a timer or a SEC("syscall") program: a thread that waits in queue `from`, wherever in it, goes to `queue`. False: it no longer waits there.
 *
 * To SCX_DSQ_LOCAL_ON | cpu, with SCX_ENQ_PREEMPT or without: 7.2 wakes the idle CPU, or takes it from the thread on it; 6.17 does so only if the thread was
 * last on another CPU, else it wants a kick after it. To a queue of our own it is safe whatever the thread's affinity has become. */
static __always_inline bool move(struct task_struct *p, u64 from, u64 queue, u64 slice_ns, u64 enq_flags)
{
	struct bpf_iter_scx_dsq it;
	bool moved = false;

	bpf_rcu_read_lock();
	if (!bpf_iter_scx_dsq_new(&it, from, 0)) {
		scx_bpf_dsq_move_set_slice___v1(&it, slice_ns);
		moved = scx_bpf_dsq_move___v1(&it, p, queue, enq_flags);
	}
	bpf_iter_scx_dsq_destroy(&it);
	bpf_rcu_read_unlock();
	return moved;
}

/* Make a CPU look for its next thread: from any operation, a timer, a SEC("syscall") program. False where the kernel's function cannot be called:
 * Debian's 7.1 and 7.2 were built with its prototype half converted, and the verifier refuses whatever is declared. */
static __always_inline bool kick(s32 cpu, u64 flags)
{
	if (!bpf_ksym_exists(scx_bpf_kick_cpu___v1))
		return false;
	scx_bpf_kick_cpu___v1(cpu, flags);
	return true;
}

#define scx_of(p) (&((struct task_struct___scx *)(p))->scx)

/* True while the thread could go on (asked of `prev` in `dispatch`). */
static __always_inline bool queued(struct task_struct *p)
{
	return scx_of(p)->flags & SCX_TASK_QUEUED;
}

/* What is left of a thread's slice; 0: the CPU looks for another at the next chance. (7.2 has a function for it, which Debian's cannot call; it
 * takes this, and says in its log that it is deprecated.) */
static __always_inline void set_slice(struct task_struct *p, u64 slice_ns)
{
	scx_of(p)->slice = slice_ns;
}
