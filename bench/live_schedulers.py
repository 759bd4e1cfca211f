"""The schedulers that the live benchmark compares: how each is put over the service's workers, and taken away again.

kernel        Linux's default, EEVDF, as it is
kernel_slice  the same with a slice of 0.1 ms set for every worker (sched_setattr, Linux 6.12 and newer)
kernel_batch  the same, RANGE requests go to workers of their own, which are SCHED_BATCH
kernel_both   both
wave          the policy `shinjuku`, decided by agentd on the other core, enforced by hostd on the workers' own
wave_mlfq     likewise the policy `mlfq`, which demotes a RANGE once instead of preempting it again and again
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from waveos.errors import WaveError
from waveos.host import doors
from waveos.host.sched import attributes
from waveos.host.sched.attributes import Attributes
from waveos.host.service import Service

PR_SET_PDEATHSIG = 1
TUNED_SLICE_NS = 100_000
START_S, STOP_S = 180.0, 10.0
"""How long hostd and an agent that compiles its policy may take to come up, and hostd to go."""
KERNEL, TUNED = "kernel", ("kernel_slice", "kernel_batch", "kernel_both")
WAVE = {"wave": "shinjuku", "wave_mlfq": "mlfq"}
"""Wave's columns, and each one's policy."""
QUANTA_US = {"wave": 200.0, "wave_mlfq": 100.0}
"""Of shinjuku: three preemptions by hostd long. mlfq has a thread taken off once, so its quantum may be shorter."""
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


class Enclave:
    """The workers as an enclave: `wave hostd`, which starts the agent. `status` is what both have counted."""

    def __init__(self, service: Service, host_core: int, agent_core: int, params: dict[str, float], policy: str = "shinjuku") -> None:
        self.name = f"bench-live-{os.getpid()}"
        command = [sys.executable, "-P", "-c", "import sys; from waveos.cli import main; sys.exit(main())", "hostd", "--enclave", self.name]
        command += ["--cpus", str(host_core), "--pids", ",".join(map(str, service.pids)), "--mechanism", "priority", "--policy", policy]
        command += [word for key, value in params.items() for word in ("--param", f"{key}={value:g}")]
        command += ["--agent-core", str(agent_core), "--measure"]
        self._process = subprocess.Popen(command, preexec_fn=as_others, stderr=subprocess.PIPE, text=True)
        try:
            deadline = time.monotonic() + START_S
            while not self._attached():
                if self._process.poll() is not None:
                    said = self._process.stderr.read() if self._process.stderr else ""
                    raise WaveError(f"hostd did not start: {said.strip()}")
                if time.monotonic() > deadline:
                    raise WaveError(f"no agent came to hostd within {START_S:.0f} s")
                time.sleep(0.02)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """hostd's."""
        return self._process.pid

    def _attached(self) -> bool:
        try:
            return bool(self.status()["agent"])
        except (WaveError, KeyError):
            return False

    def status(self) -> dict[str, Any]:
        """hostd's counters, with the agent's report."""
        return doors.ask(self.name, {"do": "status"})

    def close(self) -> None:
        """Everything as it was: hostd sees to it."""
        self._process.terminate()
        try:
            self._process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def __enter__(self) -> Enclave:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def as_others() -> None:
    """In a child of the client: an ordinary thread on any CPU, as the client was before."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


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
