/* A struct_ops that most kernels know: TCP congestion control, Reno's, that counts. */
#include "kernel.h"

char LICENSE[] SEC("license") = "GPL"; /* the kernel's struct_ops of TCP asks for it */

struct sock {
	unsigned short sk_type;
} __attribute__((preserve_access_index));

struct tcp_congestion_ops {
	char name[16];
	void (*init)(struct sock *sk);
	u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, u32 ack, u32 acked);
	u32 (*undo_cwnd)(struct sock *sk);
};

u32 tcp_reno_ssthresh(struct sock *sk) __ksym;
void tcp_reno_cong_avoid(struct sock *sk, u32 ack, u32 acked) __ksym;
u32 tcp_reno_undo_cwnd(struct sock *sk) __ksym;

u64 connections, acks;

SEC("struct_ops")
void BPF_PROG(begin, struct sock *sk)
{
	__sync_fetch_and_add(&connections, 1);
}

SEC("struct_ops")
u32 BPF_PROG(ssthresh, struct sock *sk)
{
	return tcp_reno_ssthresh(sk);
}

SEC("struct_ops")
void BPF_PROG(cong_avoid, struct sock *sk, u32 ack, u32 acked)
{
	__sync_fetch_and_add(&acks, 1);
	tcp_reno_cong_avoid(sk, ack, acked);
}

SEC("struct_ops")
u32 BPF_PROG(undo_cwnd, struct sock *sk)
{
	return tcp_reno_undo_cwnd(sk);
}

SEC(".struct_ops.link")
struct tcp_congestion_ops wave_test = {
	.name = "wave_test",
	.init = (void *)begin,
	.ssthresh = (void *)ssthresh,
	.cong_avoid = (void *)cong_avoid,
	.undo_cwnd = (void *)undo_cwnd,
};
