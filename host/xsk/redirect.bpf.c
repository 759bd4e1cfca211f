/* The XDP program of waveos.host.xsk: hands one service's UDP packets to the AF_XDP socket of their queue and leaves all else to the kernel.
 *
 * It redirects only while the one who serves the socket shows that it lives: its clock in `control.heartbeat_ns`, which it stores in every
 * turn of its loop, is at most `control.patience_ns` old. One that is stopped, dead or hung so loses the traffic to the kernel's own path, and has
 * it back with its next heartbeat. Fragments, options it does not know how to skip, and whatever is no IPv4 go to the kernel as well.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/udp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define QUEUES 64
#define IP_FRAGMENT 0x3fff /* more fragments follow, or this is not the first */

struct control { /* shared with user space: waveos.host.xsk.program.CONTROL */
	__u64 heartbeat_ns; /* CLOCK_MONOTONIC; 0: nobody serves */
	__u64 patience_ns;
	__u16 port;        /* of the service, host order */
	__u16 from_client; /* 1: packets to that port are the service's; 0: packets from it */
	__u16 sink;        /* 1: the service's packets are counted and dropped, for a generator that only counts */
	__u16 spare;
	__u64 gone;        /* workers that are gone, a bit each: between owner and server alone */
	/* what became of packets */
	__u64 redirected;
	__u64 passed;    /* not the service's */
	__u64 unserved;  /* the service's, but no heartbeat: the kernel's path */
	__u64 fragments; /* the kernel's path */
	__u64 malformed; /* of the service, by its ports, but lengths do not agree: dropped */
	__u64 sunk;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_XSKMAP);
	__uint(max_entries, QUEUES);
	__type(key, __u32);
	__type(value, __u32);
} sockets SEC(".maps");

#define COUNT(field) __sync_fetch_and_add(&c->field, 1)

SEC("xdp")
int redirect(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = (void *)(eth + 1);
	__u32 zero = 0;
	struct control *c = bpf_map_lookup_elem(&control, &zero);

	if (!c)
		return XDP_PASS;
	if ((void *)(ip + 1) > end || eth->h_proto != bpf_htons(ETH_P_IP) || ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_UDP) {
		COUNT(passed);
		return XDP_PASS;
	}
	if (ip->frag_off & bpf_htons(IP_FRAGMENT)) {
		COUNT(fragments);
		return XDP_PASS;
	}

	struct udphdr *udp = (void *)ip + ip->ihl * 4;

	if ((void *)(udp + 1) > end) {
		COUNT(passed);
		return XDP_PASS;
	}
	if ((c->from_client ? udp->dest : udp->source) != bpf_htons(c->port)) {
		COUNT(passed);
		return XDP_PASS;
	}

	__u32 length = bpf_ntohs(ip->tot_len), there = end - (void *)ip;

	if (length > there || bpf_ntohs(udp->len) < sizeof(*udp) || ip->ihl * 4u + bpf_ntohs(udp->len) > length) {
		COUNT(malformed);
		return XDP_DROP;
	}
	/* An options-free header is what the one behind the socket parses; others are the kernel's. A beat may be a little ahead of this CPU's clock. */
	if (ip->ihl != 5 || !c->heartbeat_ns || (__s64)(bpf_ktime_get_ns() - c->heartbeat_ns) > (__s64)c->patience_ns) {
		COUNT(unserved);
		return XDP_PASS;
	}

	if (c->sink) {
		COUNT(sunk);
		return XDP_DROP;
	}

	long verdict = bpf_redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);

	if (verdict == XDP_REDIRECT)
		COUNT(redirected);
	else
		COUNT(unserved);
	return verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
