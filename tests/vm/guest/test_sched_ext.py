"""The kernel's sched_ext does what the mechanism builds on, through the same header (host/sched/scx.h), on each kernel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from waveos.host.bpf import BpfError, Object
from waveos.host.sched import attributes

OBJECT = Path(__file__).with_name("holding.bpf.o")
STATE = Path("/sys/kernel/sched_ext/state")
OPS = Path("/sys/kernel/sched_ext/root/ops")
TOLD = np.dtype([("holding", "u8"), ("pid", "u4"), ("cpu", "u4"), ("preempt", "u4"), ("kick", "u4")])
SEEN = np.dtype(
    [("enqueued", "u8"), ("ran", "u8"), ("stopped", "u8"), ("dispatches", "u8", 64)]
    + [(name, "u8") for name in ("ticks", "switches", "yields", "kicks", "masks", "at_head", "left", "exit_kind")]
)
UNREGISTERED = 64
DEADLINE_S = 60  # a guest on a busy machine is slow; nothing here is a measurement


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for a condition. Fails at the deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"not so after {DEADLINE_S} s: {what}"
        time.sleep(0.01)


class Holding:
    """The scheduler, registered."""

    def __init__(self) -> None:
        self.bpf = Object(OBJECT)
        self.told = self.bpf.section(".bss.told")[: TOLD.itemsize].view(TOLD)[0]
        self.seen = self.bpf.section(".bss.seen")[: SEEN.itemsize].view(SEEN)[0]
        self.bpf.attach("on_switch")
        self.link = self.bpf.struct_ops("holding_ops")

    def give(self, pid: int, cpu: int, *, preempt: bool = False, kick: bool = True) -> bool:
        """Let a held thread run on a CPU; False if it was not held."""
        self.told["pid"], self.told["cpu"], self.told["preempt"], self.told["kick"] = pid, cpu, preempt, kick
        return bool(self.bpf.program("give").run())


@pytest.fixture
def scheduler() -> Iterator[Holding]:
    made = Holding()
    yield made
    made.bpf.close()
    until(lambda: STATE.read_text().strip() == "disabled", "the scheduler is gone, which is later than its link")


class Worker:
    """A process of the class SCHED_EXT that works in steps: each byte it is sent wakes it, and it answers with the CPU it runs on."""

    def __init__(self, policy: str = "EXT", cpus: set[int] | None = None):
        asked, self._ask = os.pipe()
        self._answer, answered = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                keep_only(asked, answered)
                if cpus:
                    os.sched_setaffinity(0, cpus)
                attributes.write(0, attributes.Attributes(policy))
                work(asked, answered)
            finally:
                os._exit(0)
        os.close(asked)
        os.close(answered)
        os.set_blocking(self._answer, False)
        until(self.sleeps, "a new worker waits for work")

    def sleeps(self) -> bool:
        """It waits for work, and no CPU has it: whoever only is about to sleep, its state "S", is woken without being enqueued."""
        return Path(f"/proc/{self.pid}/wchan").read_text() in ("pipe_read", "anon_pipe_read")

    def wake(self, how: bytes = b"w") -> None:
        """`w`: answer, then wait again; `s`: answer, then spin."""
        os.write(self._ask, how)

    def answers(self) -> bool:
        """True if it ran since the last call."""
        try:
            return bool(os.read(self._answer, 100))
        except BlockingIOError:
            return False

    def cpu_ns(self) -> int:
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0])

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._ask)
        os.close(self._answer)


def keep_only(*descriptors: int) -> None:
    """A forked process has all of its parent's, the scheduler's link as well, and would keep it alive."""
    for each in map(int, os.listdir("/proc/self/fd")):
        if each > 2 and each not in descriptors:
            with contextlib.suppress(OSError):
                os.close(each)


def work(asked: int, answered: int) -> None:
    while how := os.read(asked, 1):
        os.write(answered, b"x")
        while how == b"s":
            pass


@pytest.fixture
def workers() -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def make(*arguments, **settings) -> Worker:
        made.append(Worker(*arguments, **settings))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def holding(scheduler, workers) -> Iterator[Holding]:
    """From here on nothing of the class runs unless it is given a CPU; workers are made before, and wait for work."""
    yield scheduler
    scheduler.told["holding"] = 0  # so that what is still held can end


def held(scheduler: Holding, worker: Worker, how: bytes = b"w") -> None:
    """Wake the worker, and see that it is held."""
    before = int(scheduler.seen["enqueued"])
    worker.wake(how)
    until(lambda: scheduler.seen["enqueued"] > before, "a woken thread is enqueued")


def test_the_kernel_has_sched_ext_and_describes_its_types():
    assert STATE.read_text().strip() == "disabled"
    assert Path("/sys/kernel/btf/vmlinux").stat().st_size > 1_000_000
    assert os.uname().release.split("+")[0] in Path("/proc/version").read_text()


def test_a_registered_scheduler_is_the_kernels_until_its_link_is_destroyed(scheduler):
    assert (STATE.read_text().strip(), OPS.read_text().strip()) == ("enabled", "holding")
    until(lambda: scheduler.seen["ticks"] > 0, "the timer that `init` started ticks")
    scheduler.link.destroy()
    until(lambda: STATE.read_text().strip() == "disabled", "the scheduler is gone")
    assert scheduler.seen["exit_kind"] == UNREGISTERED


def test_a_second_scheduler_is_refused_with_a_reason(scheduler):
    with pytest.raises(BpfError, match="the kernel has one already"):
        Holding()
    assert OPS.read_text().strip() == "holding"


def test_only_threads_of_the_class_are_governed(scheduler, workers):
    ordinary = workers(policy="OTHER")
    until(lambda: not scheduler.seen["ran"], "none of the class runs")
    ordinary.wake()
    until(ordinary.answers, "an ordinary thread runs")
    assert scheduler.seen["enqueued"] == scheduler.seen["ran"] == 0
    governed = workers()
    assert attributes.read(governed.pid).policy == "EXT"
    governed.wake()
    until(governed.answers, "a thread of the class runs")
    assert scheduler.seen["enqueued"] >= 1
    assert scheduler.seen["ran"] >= 1


def test_a_held_thread_runs_when_and_where_it_is_given_a_cpu(holding, workers):
    worker = workers()
    holding.told["holding"] = 1
    for cpu in (0, 1, 1, 0):
        held(holding, worker)
        before = holding.seen["dispatches"].copy()
        os.sched_setaffinity(0, {cpu})  # this thread comes and goes, so the CPU looks for another to run
        os.sched_setaffinity(0, {0, 1})
        until(lambda at=cpu, was=before: holding.seen["dispatches"][at] > was[at], "the CPU looks for work")
        assert not worker.answers()
        assert holding.give(worker.pid, cpu)
        until(worker.answers, "it runs once it has a CPU")
        assert int(Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()[36]) == cpu


def test_a_thread_that_is_not_held_cannot_be_given_a_cpu(holding, workers):
    worker = workers()
    holding.told["holding"] = 1
    assert not holding.give(worker.pid, 0)
    assert not holding.give(999_999, 0)
    assert STATE.read_text().strip() == "enabled"


def test_a_thread_waits_behind_the_one_that_runs_and_takes_its_cpu_only_if_told_to(holding, workers):
    spinner, second, third = workers(), workers(), workers()
    holding.told["holding"] = 1
    held(holding, spinner, b"s")
    assert holding.give(spinner.pid, 1)
    until(spinner.answers, "the first runs")
    held(holding, second)
    assert holding.give(second.pid, 1)
    ran = spinner.cpu_ns()
    until(lambda: spinner.cpu_ns() > ran + 50_000_000, "the first goes on")
    assert not second.answers()

    def taken() -> bool:
        """The third runs and the first is held again; not if a kernel thread had the CPU at that moment, because then nobody of ours was preempted."""
        held(holding, third)
        enqueued = int(holding.seen["enqueued"])
        assert holding.give(third.pid, 1, preempt=True)
        until(third.answers, "the third runs")
        until(third.sleeps, "the third waits for work again")
        return bool(holding.seen["enqueued"] > enqueued)

    until(taken, "the third took the first's CPU")
    until(second.answers, "the second's turn came")
    ran = spinner.cpu_ns()
    assert holding.give(spinner.pid, 0)
    until(lambda: spinner.cpu_ns() > ran, "the first goes on elsewhere")


def test_a_kick_that_went_makes_an_idle_cpu_look(holding):
    """Not every kernel's BPF can kick; which, `kick` says itself."""
    os.sched_setaffinity(0, {0})
    holding.told["cpu"] = 1
    went = holding.bpf.program("kick_it").run()
    assert went == (os.uname().release.startswith("6.17")), "what scx.h says of this kernel is no longer so"
    before = int(holding.seen["dispatches"][1])
    if went:
        until(lambda: holding.bpf.program("kick_it").run() and holding.seen["dispatches"][1] > before, "CPU 1 looked")
    os.sched_setaffinity(0, {0, 1})


def test_a_visit_makes_a_cpu_look(holding):
    before = int(holding.seen["dispatches"][1])
    for cpu in (1, 0):
        os.sched_setaffinity(0, {cpu})
    until(lambda: holding.seen["dispatches"][1] > before, "CPU 1 looked when the visitor had left")
    os.sched_setaffinity(0, {0, 1})


def test_threads_run_on_when_their_scheduler_is_unregistered(holding, workers):
    spinner, waiting = workers(), workers()
    holding.told["holding"] = 1
    held(holding, spinner, b"s")
    assert holding.give(spinner.pid, 1)
    until(spinner.answers, "it runs")
    held(holding, waiting)
    assert not waiting.answers()
    holding.link.destroy()
    until(waiting.answers, "the kernel's own scheduler runs what was held")
    ran = spinner.cpu_ns()
    until(lambda: spinner.cpu_ns() > ran, "what ran runs on")


def test_a_scheduler_goes_with_its_process(tmp_path):
    program = f"""
import time
from waveos.host.bpf import Object
bpf = Object({str(OBJECT)!r})
link = bpf.struct_ops("holding_ops")
print("registered", flush=True)
time.sleep(1000)
"""
    owner = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "registered\n"
    assert STATE.read_text().strip() == "enabled"
    owner.kill()
    owner.wait()
    owner.stdout.close()
    until(lambda: STATE.read_text().strip() == "disabled", "the kernel took it down")


def test_all_events_share_one_lock_and_know_a_thread_by_its_storage(scheduler, workers):
    worker = workers()
    for _ in range(3):
        worker.wake()
        until(worker.answers, "it runs")
    until(lambda: scheduler.seen["switches"] > 0, "the tracepoint finds what the operation stored")
    os.sched_setaffinity(worker.pid, {0})
    until(lambda: scheduler.seen["masks"] > 0, "affinity is told")
    assert scheduler.seen["stopped"] > 0
