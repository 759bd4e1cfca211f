"""The host's half as hostd sees it: the tables that `wave.bpf.h` keeps in the kernel, mapped, and the programs that act on them."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np

from waveos.host.bpf import Object
from waveos.outcome import Outcome

# As declared in wave.bpf.h; sizes are compared when the object is loaded.
THREADS, CPUS, STAGED, BUCKETS = 4_096, 256, 8, 256
NOBODY = -1
ABSENT, BLOCKED, RUNNABLE, RUNNING = range(4)
DECISION = np.dtype(
    [("seq", "u8"), ("basis_ns", "u8"), ("decided_ns", "u8"), ("txn", "u8"), ("tid", "i4"), ("flags", "u4"), ("cpu_seq", "u4"), ("type", "u4")]
)
THREAD = np.dtype(
    [
        ("seq", "u8"),
        ("since_ns", "u8"),
        ("ran_ns", "u8"),
        ("pid", "u4"),
        ("cpu", "i4"),
        ("epoch", "u4"),
        ("state", "u1"),
        ("dying", "u1"),
        ("demoted", "u1"),
        ("lowered", "u1"),
        ("allowed", "u8", (CPUS // 64,)),
    ]
)
CPU = np.dtype(
    [
        ("running", "i4"),
        ("stray", "i4"),
        ("seq", "u4"),
        ("kernel", "u4"),
        ("head", "u4"),
        ("staged", "u4"),
        ("present", "u1"),
        ("idle", "u1"),
        ("taken", "u1"),
        ("rung", "u1"),
        ("deviates", "u1"),
        ("spare", "u1", (3,)),
        ("claimant", "u4"),
        ("spare2", "u4"),
        ("queue", DECISION, (STAGED,)),
    ]
)
COUNTERS = ("overflow", "messages", "decisions", "strays", "deviations", "acts", "fallbacks")
HOST = np.dtype(
    [
        ("up_next", "u8"),
        ("up_credit", "u8"),
        ("down_next", "u8"),
        ("down_credit", "u8"),
        ("generation", "u4"),
        ("epoch", "u4"),
        ("cpus", "u4"),
        ("hostd", "u4"),
        ("live", "u1"),
        ("lost", "u1"),
        ("spare", "u1", (6,)),
        ("overflow", "u8"),
        ("outcomes", "u8", (16,)),
        ("messages", "u8"),
        ("decisions", "u8"),
        ("strays", "u8"),
        ("deviations", "u8"),
        ("acts", "u8"),
        ("fallbacks", "u8"),
        ("age", "u8", (BUCKETS,)),
        ("round_trip", "u8", (BUCKETS,)),
        ("enforced", "u8", (BUCKETS,)),
        ("enclave_cpu", "i2", (1_024,)),
        ("thread", THREAD, (THREADS,)),
        ("cpu", CPU, (CPUS,)),
    ]
)
LIVE, LOST = 0, 1
HEARTBEAT_AT = 18
"""The word of the ring of transactions where the agent stores its clock (waveos.ring.HEARTBEAT_AT; hostd cannot import what brings numba)."""


class Replay(ctypes.Structure):
    """How far a replay is."""

    _fields_ = [("generation", ctypes.c_uint32), ("next", ctypes.c_uint32)]


class Half:
    """A loaded object of a mechanism, whose CPUs are those of the enclave, in their order."""

    def __init__(self, bpf: Object, cpus: list[int], hostd: int) -> None:
        self.bpf = bpf
        table = bpf.section(".bss.host")
        if table.nbytes < HOST.itemsize:
            raise AssertionError(f"wave.bpf.h keeps {table.nbytes} bytes, half.py knows {HOST.itemsize}: make bpf")
        self.host: np.ndarray[Any, Any] = table[: HOST.itemsize].view(HOST)
        self.messages = bpf.section(".bss.messages").view(np.int64)
        self.txns = bpf.section(".bss.txns").view(np.int64)
        at = HOST.fields["live"][1]  # type: ignore[index]
        self._signs = table.data[at : at + 2]  # `live` and `lost`
        self._words = self.txns.data  # what every tick reads costs a tenth without NumPy
        self._replay = Replay(0, THREADS)
        self._joined = False
        self._start, self._stop, self._resync = (bpf.program(name) for name in ("start", "stop", "resync"))
        host = self.host
        host["hostd"], host["cpus"], host["enclave_cpu"], host["cpu"]["running"], host["cpu"]["stray"] = hostd, len(cpus), NOBODY, NOBODY, NOBODY
        for number, kernel in enumerate(cpus):
            host["cpu"]["kernel"][0, number], host["cpu"]["present"][0, number], host["enclave_cpu"][0, kernel] = kernel, 1, number

    @property
    def live(self) -> bool:
        """An agent is attached and has not been lost."""
        return bool(self._signs[LIVE])

    @property
    def abandoned(self) -> bool:
        """The kernel's side has found the agent silent, and nobody has told it so yet."""
        return self._joined and not self.live

    def start(self, generation: int) -> None:
        """Empty rings for a new agent, and the whole state in them."""
        if self._joined:
            self.stop()
        self.messages[:] = 0
        self.txns[:] = 0
        self.txns[HEARTBEAT_AT] = time.monotonic_ns()
        self._replay.generation, self._replay.next = generation, 0
        self._start.run(self._replay)
        self._joined = True
        self._go_on()

    def stop(self) -> None:
        """The agent is gone; if it lives, it finds that its rings are no more, and comes back."""
        self._joined = False
        self._replay.next = THREADS
        self._stop.run()

    def silent_ns(self) -> int:
        """How long the agent has been silent; 0 without one."""
        return max(0, time.monotonic_ns() - self._words[HEARTBEAT_AT]) if self.live else 0

    def keep_up(self) -> None:
        """Replay where messages were lost, or where the last replay had no room to end."""
        if self._signs[LOST] and self.live:
            self._replay.next = 0
        if self._replay.next < THREADS:
            self._go_on()

    def _go_on(self) -> None:
        self._replay.next = self._resync.run(self._replay)

    def counters(self) -> dict[str, Any]:
        """Plain numbers, outcomes by name, what is queued where, and three histograms as (lower edge in ns, count): `age_ns` of all committed decisions,
        and of those for a CPU that waited or was preempted `round_trip_ns` and `enforced_ns`."""
        host = self.host[0]
        found: dict[str, Any] = {name: int(host[name]) for name in COUNTERS}
        found["outcomes"] = {outcome.name.lower(): int(host["outcomes"][outcome]) for outcome in Outcome}
        for name, counts in (("age", host["age"] + host["round_trip"]), ("round_trip", host["round_trip"]), ("enforced", host["enforced"])):
            found[f"{name}_ns"] = [(edge_ns(bucket), int(counts[bucket])) for bucket in np.flatnonzero(counts).tolist()]
        found["threads"] = int(np.count_nonzero(host["thread"]["pid"]))
        found["queued"] = {"staged": int(host["cpu"]["staged"].sum()), "runnable": int(np.count_nonzero(host["thread"]["state"] == RUNNABLE))}
        return found

    def on_cpus(self) -> list[dict[str, Any]]:
        """What each CPU of the enclave does: number, state, the process that runs there by decision or (a stray) without, decisions staged."""
        host = self.host[0]
        rows = []
        for each in host["cpu"][: int(host["cpus"])]:
            tid = int(each["running"] if each["running"] >= 0 else each["stray"])
            state = "taken" if each["taken"] else "run" if each["running"] >= 0 else "stray" if tid >= 0 else "idle"
            pid = int(host["thread"]["pid"][tid]) if tid >= 0 else 0
            rows.append({"cpu": int(each["kernel"]), "state": state, "tid": tid, "pid": pid, "staged": int(each["staged"])})
        return rows


def edge_ns(bucket: int) -> int:
    """The lower edge of a bucket of the kernel's histograms: four to each power of two."""
    return bucket if bucket < 8 else (4 | bucket & 3) << (bucket >> 2) - 2
