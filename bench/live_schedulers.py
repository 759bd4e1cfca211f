"""The schedulers that the live benchmark compares: how each is put over the service's workers, and taken away again.

kernel        Linux's default, EEVDF, as it is
kernel_slice  the same with a slice of 0.1 ms set for every worker (sched_setattr, Linux 6.12 and newer)
kernel_batch  the same, RANGE requests go to workers of their own, which are SCHED_BATCH
kernel_both   both
wave          the policy `shinjuku`, by agentd on the other core, enforced by hostd
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from waveos.host.sched import attributes
from waveos.host.sched.attributes import Attributes
from waveos.host.service import Service

PR_SET_PDEATHSIG = 1
TUNED_SLICE_NS = 100_000
KERNEL, TUNED = "kernel", ("kernel_slice", "kernel_batch", "kernel_both")
RANGE_SHARE_OF_WORKERS = 0.5
"""Of the workers, where RANGEs have their own: enough that none waits for one."""


@contextlib.contextmanager
def kernel(service: Service, name: str, agent_core: int) -> Iterator[Any]:
    """One of the kernel's columns; gives the groups for `Service.serve`. In the agent's place an ordinary process polls, so that its core is as awake."""
    batch, short = name in ("kernel_batch", "kernel_both"), name in ("kernel_slice", "kernel_both")
    workers = len(service.pids)
    ranges = max(1, round(workers * RANGE_SHARE_OF_WORKERS)) if batch else workers
    groups = np.array([[0, workers - ranges], [workers - ranges, ranges]] if batch else [[0, workers]] * 2, np.int64)
    before = {pid: attributes.read(pid) for pid in service.pids}
    try:
        for number, pid in enumerate(service.pids):
            policy = "BATCH" if batch and number >= workers - ranges else "OTHER"
            attributes.write(pid, Attributes(policy, slice_ns=TUNED_SLICE_NS if short else 0))
        with polling(agent_core):
            yield groups
    finally:
        for pid, old in before.items():
            with contextlib.suppress(ProcessLookupError):
                attributes.write(pid, old)


@contextlib.contextmanager
def polling(core: int, nice: int = 10) -> Iterator[None]:
    """A process that polls on that core at raised nice, as an agent does. It does not inherit the client's real-time priority, or would keep it waiting."""
    lines = (
        "import ctypes, os",
        f"ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {signal.SIGKILL:d})",
        "os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))",
        f"os.sched_setaffinity(0, {{{core}}})",
        f"os.nice({nice})",
        "while True: pass",
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", "\n".join(lines)])
    try:
        yield
    finally:
        process.kill()
        process.wait()
