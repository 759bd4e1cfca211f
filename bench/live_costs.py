"""What the emulator is told of this machine, each figure from an experiment of its own that has no scheduling in it.

service    a burst of requests, the workers SCHED_FIFO: each runs to its end in turn, and the time between two completions is the whole of what a request
           takes on the host CPU: the switch to its worker, the system call, RocksDB, and blocking. GETs by three workers, whose caches stay warm, RANGEs by all
           once more with hostd and an agent whose quantum never ends: what telling the agent of every switch costs is in Wave's times, nothing else of Wave
cold       the same GETs by 5, 9, 17, ... workers in turn: what one takes longer for the others that have had the CPU and its caches meanwhile
lateness   requests 60 us apart: sent, after it was to be sent
idle wake  the same: done, after it was sent, less the service: a CPU that has just fallen asleep is woken, and has cooled a little
switch     a byte to and fro between two processes of one CPU, less the calls
interrupt  GETs on workers of a higher real-time priority interrupt a RANGE: what it takes longer for each, less the GET and one switch; at most an idle wake,
           of which it is a part
resume     what is left then: what the two lose of their caches to each other
pace       the same small piece of arithmetic over and over, by an ordinary process that has the host CPU to itself: how long each took, one after another.
           Times of GETs that took more than three of the usual met a slow moment, and are left out above: the pace has those
slice      the kernel's, from sched_getattr; the tick from the coarse clock's resolution
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from waveos.bench.live_schedulers import Enclave, as_others, polling
from waveos.bench.live_watch import SLOW, Watch, find_disturbed, work
from waveos.bench.live_window import GAP_NS, quantiles_us
from waveos.errors import WaveError
from waveos.host import rocksdb
from waveos.host.sched import attributes
from waveos.host.sched.attributes import Attributes
from waveos.host.service import Load, Served, Service, draw_load
from waveos.jit import jit
from waveos.primitives import clock_ns

BURST, BURST_PER_S = 60_000, 200_000.0
WARM = 3
"""Workers: with two the client sometimes finds neither."""
TURNS = 12_000
"""GETs of one point of the curve `cold`."""
APART, APART_NS, APART_JITTER_NS = 15_000, 60_000, 20_000
TRAINS, TRAIN_NS, WAGONS, WAGON_NS = 160, 4_000_000, 10, 60_000
PINGS = 3_000
PIECES = 500_000
"""Of `pace`, some 3 us each."""
NEVER_US = 10_000_000.0
CLOCK_MONOTONIC_COARSE = 6
"""Linux's number (clock_gettime(2)); Python names only the fine one. It moves with the tick."""


@dataclass(frozen=True)
class Costs:
    """All in ns. Samples are of single requests."""

    get_ns: NDArray[np.int64]  # host CPU time of one GET, switches included, with warm caches
    range_ns: NDArray[np.int64]
    wave_get_ns: NDArray[np.int64]  # the same in an enclave
    wave_range_ns: NDArray[np.int64]
    cold_ns: tuple[int, ...]  # what a GET takes longer after up to 1, 2, 4, ... turns of others
    late_ns: NDArray[np.int64]  # of requests every APART_NS, one after another
    wake_ns: float  # an idle CPU, until the woken thread runs
    switch_ns: float
    interrupt_ns: float  # taken by a thread that is preempted
    resume_ns: float  # by one that goes on
    slice_ns: int
    tick_ns: int
    pipe_rtt_ns: float  # between the two CPUs
    pace_ns: NDArray[np.int64]  # times of equal pieces of work

    @property
    def capacity_per_s(self) -> float:
        """Requests that the CPU could serve if it did nothing else, 0.5 % of them RANGEs as in every load here."""
        return 1e9 / (0.995 * (float(self.get_ns.mean()) + self.cold_ns[-1]) + 0.005 * float(self.range_ns.mean()))

    def metrics(self) -> dict[str, float]:
        """For the benchmark's result."""
        get, ranges, late = (quantiles_us(each) for each in (self.get_ns, self.range_ns, self.late_ns))
        return {
            "cost_get_p50_us": get[0],
            "cost_get_mean_us": float(self.get_ns.mean()) / 1_000,
            "cost_cold_us": self.cold_ns[-1] / 1_000,
            "cost_range_p50_us": ranges[0],
            "cost_wave_get_p50_us": quantiles_us(self.wave_get_ns)[0],
            "cost_wave_get_mean_us": float(self.wave_get_ns.mean()) / 1_000,
            "cost_late_p50_us": late[0],
            "cost_late_p99_us": late[1],
            "cost_idle_wake_us": self.wake_ns / 1_000,
            "cost_switch_us": self.switch_ns / 1_000,
            "cost_interrupt_us": self.interrupt_ns / 1_000,
            "cost_resume_us": self.resume_ns / 1_000,
            "pace_mean": float(self.pace_ns.mean() / np.median(self.pace_ns)),
            "pipe_rtt_p50_ns": self.pipe_rtt_ns,
        }

    def describe(self) -> str:
        """How they were found."""
        return str(__doc__)


def measure(service: Service, watch: Watch, host_core: int, client_core: int, seed: int) -> Costs:
    """All costs; the caller is the client and on its core."""
    with _real_time(service), polling(client_core):
        service.serve(_apart(200, seed))  # compiles, and touches everything once
        gets, _ = _service(service, watch, seed, WARM)
        _, ranges = _service(service, watch, seed)
        cold = _cold(service, watch, seed)
        apart = service.serve(_apart(APART, seed))
        quiet = _quiet(apart, watch)
        longer = _interrupted(service, watch)
    with Enclave(service, host_core, client_core, {"quantum_us": NEVER_US}):
        wave_gets, _ = _service(service, watch, seed, WARM)
        _, wave_ranges = _service(service, watch, seed)
    late = (apart.sent_ns - apart.intended_ns)[quiet]
    waking = float(np.median((apart.done_ns - apart.sent_ns)[quiet])) - float(np.median(gets))
    with polling(client_core):
        switch = _ping(host_core, host_core) / 2 - _calls()
        across = _ping(host_core, client_core)
    usual = attributes.usual_slice_ns()
    tick = round(time.clock_getres(CLOCK_MONOTONIC_COARSE) * 1e9)
    interrupted = max(0.0, longer - float(gets.mean()) - switch)
    interrupt = min(max(0.0, waking), interrupted)
    return Costs(
        get_ns=gets,
        range_ns=ranges,
        wave_get_ns=wave_gets,
        wave_range_ns=wave_ranges,
        cold_ns=cold,
        late_ns=late,
        wake_ns=max(1.0, waking),
        switch_ns=max(1.0, switch),
        interrupt_ns=interrupt,
        resume_ns=interrupted - interrupt,
        slice_ns=usual,
        tick_ns=tick,
        pipe_rtt_ns=across,
        pace_ns=_pace(host_core),
    )


@contextlib.contextmanager
def _real_time(service: Service) -> Iterator[None]:
    for pid in service.pids:
        attributes.write(pid, Attributes("FIFO", priority=1))
    try:
        yield
    finally:
        for pid in service.pids:
            attributes.write(pid, Attributes())


def _apart(n: int, seed: int) -> Load:
    """GETs that do not meet."""
    random = np.random.default_rng(seed)
    return Load(np.arange(n) * APART_NS + random.integers(0, APART_JITTER_NS, n), random.integers(0, rocksdb.ENTRIES, n))


def _quiet(served: Served, watch: Watch) -> NDArray[np.bool_]:
    """Which requests were served while the host CPU was itself."""
    return ~find_disturbed(served, watch.slow(int(served.intended_ns[0]), int(served.done_ns.max())))


def _service(service: Service, watch: Watch, seed: int, workers: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Times between completions while there is always a request, of GETs and RANGEs; with some of the workers only GETs, fewer, and RANGEs that are none."""
    requests, range_share = (TURNS, 0.0) if workers else (BURST, 0.005)
    load = draw_load(BURST_PER_S, round(requests / BURST_PER_S * 1e9), range_share, rocksdb.ENTRIES, rocksdb.RANGE_ENTRIES, seed)
    served = service.serve(load, np.array([[0, workers or len(service.pids)]] * 2, np.int64), patience_s=10.0)
    order = np.argsort(served.done_ns)
    order = order[len(order) // 20 : -2 * len(service.pids)]  # the beginning warms up, the end runs dry
    done_ns = served.done_ns[order]
    took, at_ns = np.diff(done_ns), done_ns[1:]
    ours = took < GAP_NS  # longer: the CPU was not ours, which is told as throttled
    for begin_ns, end_ns in watch.slow(int(done_ns[0]), int(done_ns[-1])):
        ours &= (at_ns < begin_ns) | (at_ns > end_ns)
    took, is_range = took[ours], served.is_range[order][1:][ours]
    gets = took[~is_range]
    return gets[gets <= SLOW * np.median(gets)].astype(np.int64), took[is_range].astype(np.int64)


def _cold(service: Service, watch: Watch, seed: int) -> tuple[int, ...]:
    """`Costs.cold_ns`: by workers that take turns, 2**k of others to each."""
    counts = [WARM] + [min(2**k + 1, len(service.pids)) for k in range(2, len(service.pids).bit_length())]
    means = np.array([float(_service(service, watch, seed, count)[0].mean()) for count in counts])
    longer = np.maximum.accumulate(means - means[0])
    return 0, *(round(each) for each in longer)


def _interrupted(service: Service, watch: Watch) -> float:
    """What a GET of a higher priority in its midst adds to a RANGE, ns: every other RANGE has some, so that both kinds meet the same machine."""
    half = len(service.pids) // 2
    groups = np.array([[0, half], [half, len(service.pids) - half]], np.int64)
    for pid in service.pids[:half]:
        attributes.write(pid, Attributes("FIFO", priority=2))
    starts, wagons = np.arange(TRAINS) * TRAIN_NS, np.arange(1, WAGONS + 1) * WAGON_NS
    gets_ns = (starts[1::2, None] + wagons).reshape(-1)
    at_ns, keys = np.concatenate([starts, gets_ns]), np.concatenate([-1 - 1_000 * np.arange(TRAINS), 1_000 * np.arange(len(gets_ns))])
    order = np.argsort(at_ns, kind="stable")
    served = service.serve(Load(at_ns[order], keys[order]), groups)
    ranges = served.is_range & _quiet(served, watch)
    took, has_gets = (served.done_ns - served.sent_ns)[ranges], at_ns[order][ranges] // TRAIN_NS % 2 == 1
    return float(np.median(took[has_gets]) - np.median(took[~has_gets])) / WAGONS


@contextlib.contextmanager
def _beside(core: int, task: Callable[[], object]) -> Iterator[None]:
    """Meanwhile an ordinary process of its own does that on that CPU, and has done it at the end. Raises WaveError if it did not."""
    pid = os.fork()
    if pid == 0:
        failed = True
        try:
            as_others()
            os.sched_setaffinity(0, {core})
            task()
            failed = False
        finally:
            os._exit(failed)
    try:
        yield
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    if os.waitpid(pid, 0)[1]:
        raise WaveError(f"what was to be measured on CPU {core} did not come to its end")


def _ping(here: int, there: int) -> float:
    """Median round trip of a byte through two pipes between processes on two CPUs, ns."""
    (their_in, our_out), (our_in, their_out) = os.pipe(), os.pipe()
    before, policy, parameter = os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0)

    def answer() -> None:
        for _ in range(PINGS):
            os.read(their_in, 1)
            os.write(their_out, b"x")

    times = []
    try:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, {here})
        with _beside(there, answer):
            for _ in range(PINGS):
                begun = time.monotonic_ns()
                os.write(our_out, b"x")
                os.read(our_in, 1)
                times.append(time.monotonic_ns() - begun)
    finally:
        for fd in (their_in, our_out, our_in, their_out):
            os.close(fd)
        os.sched_setscheduler(0, policy, parameter)
        os.sched_setaffinity(0, before)
    return float(np.median(times))


@jit
def _time_pieces(took_ns: Any) -> None:
    x, before_ns = 1, clock_ns()
    for i in range(len(took_ns)):
        x = work(x)
        now_ns = clock_ns()
        took_ns[i], before_ns = now_ns - before_ns, now_ns
    took_ns[0] += x & 1  # so that the work is not left out


def _pace(core: int) -> NDArray[np.int64]:
    """`Costs.pace_ns`."""
    took_ns = np.frombuffer(mmap.mmap(-1, 8 * PIECES), np.int64)
    _time_pieces(took_ns[:1])  # compiles it
    with _beside(core, lambda: _time_pieces(took_ns)):
        pass
    return took_ns


def _calls() -> float:
    """A write and a read of a pipe that need not wait, ns."""
    into, out = os.pipe()
    begun = time.monotonic_ns()
    for _ in range(PINGS):
        os.write(out, b"x")
        os.read(into, 1)
    took = (time.monotonic_ns() - begun) / PINGS
    os.close(into)
    os.close(out)
    return took
