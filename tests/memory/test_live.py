"""Memory on this machine's own kernel: a process, the mechanism's daemon and an agent, and what is left when one of them is killed."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waveos.errors import MissingError
from waveos.host import changes
from waveos.host.memory.procfs import swap_free_kib
from waveos.host.memory.zram import Zram
from waveos.host.restore import Journal, restore

CGROUPS = Path("/sys/fs/cgroup/memory")
DEADLINE_S = 90.0
BATCHES = 64

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not (CGROUPS / "memory.limit_in_bytes").exists(),
    reason="needs root and the memory controller of cgroup version 1: it makes a cgroup and swap, and advises another process",
)

APPLICATION = """
import ctypes, mmap, sys, zlib
BATCH, N = 2 << 20, int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
memory = mmap.mmap(-1, N * BATCH, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
view = memoryview(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for number in range(0, N, 2):
    assert libc.madvise(ctypes.c_void_p(address + number * BATCH), ctypes.c_size_t(BATCH), 16) == 0
for number in range(N):
    for page in range(0, BATCH, 4096):
        view[number * BATCH + page : number * BATCH + page + 8] = (number * BATCH + page).to_bytes(8, "little")
print("ready", flush=True)
for line in sys.stdin:  # "touch": the hot half; "check": all of it
    if line == "check\\n":
        print(all(int.from_bytes(view[at : at + 8], "little") == at for at in range(0, N * BATCH, 4096)), flush=True)
    else:
        print(sum(view[at] for at in range(0, N * BATCH // 2, 4096)), flush=True)
"""


class World:
    """A cgroup with an application in it, swap, and whoever manages its memory."""

    def __init__(self, stack, folder):
        self.name = f"test-memory-{os.getpid()}-{secrets.token_hex(3)}"
        self.folder, self._stack = folder, stack
        self.journal = Journal(self.name)
        stack.callback(self.journal.close)
        self.cgroup = CGROUPS / f"wave-{self.name}"
        changes.note_new_folder(self.journal, self.cgroup)
        self.cgroup.mkdir()
        if swap_free_kib() < (512 << 10):
            try:
                stack.enter_context(Zram(self.journal, 1 << 30))
            except MissingError as error:
                pytest.skip(str(error))
        self.application = self._start([sys.executable, "-P", "-c", APPLICATION, str(BATCHES)], stdin=subprocess.PIPE, inside=True)
        assert self.application.stdout.readline() == "ready\n"
        self.daemon = None
        stack.callback(self._clear)

    def _clear(self):
        """What a daemon that was killed leaves: its journal, and the segment of its link."""
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait()
            restore([f"{self.name}-daemon"])
        Path(f"/dev/shm/wave-{self.name}").unlink(missing_ok=True)

    def _start(self, command, inside=False, **more):
        def enter():
            if inside:
                (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))

        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter, **more)

        def end():
            process.kill()
            process.communicate()

        self._stack.callback(end)
        return process

    def manage(self, policy="region_age", link="shm", **params):
        """Start the daemon, which starts the agent."""
        self.status = self.folder / "status.json"
        self.status.unlink(missing_ok=True)
        url = f"shm://{self.name}" if link == "shm" else link
        command = [sys.executable, "-P", "-m", "waveos.host.memory.daemon", url, "--cgroup", str(self.cgroup), "--pass-ms", "100"]
        command += ["--enclave", f"{self.name}-daemon", "--policy", policy, "--status", str(self.status)]
        for name, value in params.items():
            command += ["--param", f"{name}={value}"]
        self.daemon = self._start(command)

    def facts(self):
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self.status.read_text())
        return {}

    def ask(self, what):
        self.application.stdin.write(what + "\n")
        self.application.stdin.flush()
        return self.application.stdout.readline().strip()

    def rss_mib(self):
        return int(Path(f"/proc/{self.application.pid}/statm").read_text().split()[1]) * 4 // 1024

    def agent(self):
        """The agent's pid: the daemon's child."""
        return int(Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children").read_text().split()[0])

    def until(self, condition):
        """Keep the hot half hot until it is true."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"it never came true; {self.facts()}"
            self.ask("touch")
            time.sleep(0.02)

    def limit(self):
        return int((self.cgroup / "memory.limit_in_bytes").read_text())


@pytest.fixture
def world(tmp_path):
    with contextlib.ExitStack() as stack:
        made = World(stack, tmp_path)
        yield made
    assert not made.cgroup.exists()


AGE = {"scan_ms": 200, "age_ms": 1000, "quota_share_per_s": 1}


def test_the_cold_half_is_paged_out_the_hot_half_stays_and_all_of_it_can_be_read(world):
    full = world.rss_mib()
    world.manage(**AGE)
    world.until(lambda: world.rss_mib() < full - 0.4 * BATCHES * 2)
    assert world.rss_mib() > full - 0.75 * BATCHES * 2
    assert world.ask("check") == "True"


def test_an_agent_that_is_killed_leaves_a_process_that_lives_and_a_new_one_goes_on(world):
    full = world.rss_mib()
    world.manage(**AGE)
    world.until(lambda: world.rss_mib() < full - 0.2 * BATCHES * 2)
    os.kill(world.agent(), signal.SIGKILL)
    world.until(lambda: world.facts().get("agent") is False)
    assert world.ask("check") == "True"


def test_a_daemon_that_is_killed_leaves_a_limit_that_restore_takes_back(world):
    limit = world.limit()
    world.manage("static", limit_mib=100)
    world.until(lambda: world.limit() == 100 << 20)
    world.daemon.kill()
    world.daemon.wait()
    assert world.limit() == 100 << 20
    done, failed = restore([f"{world.name}-daemon"])
    assert failed == []
    assert any("memory.limit_in_bytes" in line for line in done)
    assert world.limit() == limit
    assert world.ask("check") == "True"


def test_a_limit_goes_when_its_agent_is_killed_and_when_the_daemon_is_stopped(world):
    limit = world.limit()
    world.manage("static", limit_mib=100)
    world.until(lambda: world.limit() == 100 << 20)
    os.kill(world.agent(), signal.SIGKILL)
    world.until(lambda: world.limit() == limit)
    world.daemon.terminate()
    assert world.daemon.wait(DEADLINE_S) == 0
    assert world.ask("check") == "True"


def test_the_daemon_ends_with_its_last_process(world):
    world.manage(**AGE)
    world.until(lambda: world.facts().get("agent"))
    world.application.kill()
    assert world.daemon.wait(DEADLINE_S) == 0
