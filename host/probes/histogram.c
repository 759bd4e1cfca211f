// A histogram of times: eight steps to each doubling, so a percentile is read to an eighth. `waveos.host.probes.histogram` reads it.

#define BUCKETS 512

BPF_PERCPU_ARRAY(histogram, u64, BUCKETS);

static __always_inline void record(u64 ns)
{
	u64 units = ns * 1049 >> 10;  // 1024 a microsecond, so that the bounds between doublings are whole microseconds
	u32 top = bpf_log2l(units | 1) - 1;
	int bucket = top < 3 ? units : (top - 2) * 8 + ((units >> (top - 3)) & 7);
	u64 *times = histogram.lookup(&bucket);
	if (times)
		*times += 1;
}
