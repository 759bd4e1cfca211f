"""Memory on a real kernel: a process, hostd and an agent, and what is left when one of them is killed.

Here with cgroups of version 1 and referenced bits; `make test-vm` runs the one that says so with version 2 and DAMON.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from waveos.errors import ConfigError, LinkError, MissingError
from waveos.host import changes
from waveos.host.doors import ask
from waveos.host.memory.procfs import swap_free_kib
from waveos.host.memory.zram import Zram
from waveos.host.restore import Journal, path_of, restore
from waveos.keys import Keys
from waveos.paths import cache_dir
from waveos.process import start_time

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
CGROUPS, LIMIT = (V1, "memory.limit_in_bytes") if (V1 / "cgroup.procs").exists() else (V2, "memory.high")
DAMON_STAT = Path("/sys/module/damon_stat/parameters/enabled")
WAVE = ["-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))"]
SLOW = 1 if CGROUPS == V1 else 10  # a guest is: emulated, with one processor for hostd, agent and application
DEADLINE_S = 90.0 if SLOW == 1 else 600.0
BATCHES = 64


def has_memory_controller():
    """Whether cgroups may have one."""
    return CGROUPS == V1 or "memory" in (V2 / "cgroup.controllers").read_text().split() if (CGROUPS / "cgroup.procs").exists() else False


pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not has_memory_controller(),
    reason="needs root and cgroups with a memory controller: it makes one and swap, and advises another process",
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

    def __init__(self, stack):
        self.name = f"test-memory-{os.getpid()}-{secrets.token_hex(3)}"
        self.enclave, self._stack = f"{self.name}-hostd", stack
        self.journal = Journal(self.name)
        stack.callback(self.journal.close)
        if CGROUPS == V2:
            self._change(V2 / "cgroup.subtree_control", "+memory")
            if DAMON_STAT.exists():
                self._change(DAMON_STAT, "N")  # it would keep DAMON for itself
            if not Path("/sys/block/zram0").exists() and (modules := cache_dir("kernels") / os.uname().release / "usr").is_dir():
                subprocess.run(["modprobe", "-d", str(modules), "zram"], check=False)
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
        self.hostd = None
        stack.callback(self._clear)

    def _change(self, path, text):
        """Until the test ends; what a cgroup of version 2 hands down is added, and is taken away again."""
        was = path.read_text().split()
        if text.lstrip("+") not in was:
            path.write_text(text)
            self._stack.callback(path.write_text, text.replace("+", "-") if text.startswith("+") else " ".join(was))

    def _clear(self):
        """What a hostd that was killed leaves."""
        if self.hostd is not None:
            self.hostd.terminate()
            try:
                self.hostd.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self.hostd.kill()
                self.hostd.wait()
        restore([self.enclave])
        shutil.rmtree(path_of(self.enclave).parent, ignore_errors=True)  # a killed one's sockets

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

    def manage(self, policy="region_age", *more, **params):
        """Start hostd, which starts the agent; with no policy, none."""
        command = [sys.executable, "-P", *WAVE, "hostd", "--subsystem", "memory", "--enclave", self.enclave, "--cgroup", str(self.cgroup)]
        command += ["--setting", f"pass_ms={100 * SLOW}", *(["--policy", policy] if policy else ["--no-agent"]), *more]
        for name, value in params.items():
            command += ["--param", f"{name}={value}"]
        self.hostd = self._start(command)

    def wave(self, *arguments, keys=None):
        """A command of Wave's, with its machine's keys."""
        environment = {**os.environ, **({"WAVE_KEYS": str(keys.folder)} if keys else {})}
        return self._start([sys.executable, "-P", *WAVE, *arguments], env=environment)

    def facts(self):
        """What hostd tells; {} while there is none."""
        with contextlib.suppress(ConfigError, LinkError):
            return ask(self.enclave, {"do": "status"}, DEADLINE_S)
        return {}

    def ask(self, what):
        self.application.stdin.write(what + "\n")
        self.application.stdin.flush()
        return self.application.stdout.readline().strip()

    def rss_mib(self):
        return int(Path(f"/proc/{self.application.pid}/statm").read_text().split()[1]) * 4 // 1024

    def agent(self):
        """The pid of the agent that is attached, or None."""
        return (self.facts().get("agent") or {}).get("pid")

    def until(self, condition):
        """Keep the hot half hot until it is true."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end, f"it never came true; {self.facts()}"
            self.ask("touch")
            time.sleep(0.02 * SLOW)

    def limit(self):
        """The cgroup's limit, MiB; None if it has none."""
        text = (self.cgroup / LIMIT).read_text().strip()
        return None if text == "max" or int(text) > 1 << 60 else int(text) >> 20


@pytest.fixture
def world():
    with contextlib.ExitStack() as stack:
        made = World(stack)
        yield made
    assert not made.cgroup.exists()


AGE = {"scan_ms": 200 * SLOW, "age_ms": 1000 * SLOW, "quota_share_per_s": 1}


def test_in_a_vm_or_here_the_cold_half_is_paged_out_and_a_hostd_that_is_killed_under_a_limit_leaves_what_restore_takes_back(world):
    full, limit = world.rss_mib(), world.limit()
    world.manage(**AGE)
    world.until(lambda: world.rss_mib() < full - 0.4 * BATCHES * 2)
    assert world.rss_mib() > full - 0.75 * BATCHES * 2
    told = {}
    world.until(lambda: (told.update(world.facts()), told.get("report"))[1])  # an agent that is asked may tell too late
    assert (told["subsystem"], told["cpus"], told["policy"], told["report"]["policy"]) == ("memory", "", "region_age", "region_age")
    assert told["counters"]["sensor"] == ("DAMON" if CGROUPS == V2 else "referenced bits by mapping")
    assert told["counters"]["advised_kib"]["pageout"] >= 0.4 * BATCHES * 2048
    assert told["report"]["decisions"] > 0

    assert ask(world.enclave, {"do": "set-policy", "policy": "static", "params": {"limit_mib": 100}}, DEADLINE_S)["ok"]
    world.until(lambda: world.limit() == 100)
    agent = world.agent()
    world.hostd.kill()
    world.hostd.wait()
    assert world.limit() == 100
    done, failed = restore([world.enclave])
    assert failed == []
    assert any(LIMIT in line for line in done)
    assert world.limit() == limit
    assert world.ask("check") == "True"
    world.until(lambda: start_time(agent) is None)  # it ends with the hostd that started it


def test_an_agent_that_is_killed_leaves_a_process_that_lives_and_a_new_one_goes_on(world):
    full = world.rss_mib()
    world.manage(**AGE)
    world.until(lambda: world.rss_mib() < full - 0.2 * BATCHES * 2)
    first = world.agent()
    os.kill(first, signal.SIGKILL)
    assert world.ask("check") == "True"
    world.until(lambda: world.agent() not in (None, first))
    world.until(lambda: world.rss_mib() < full - 0.2 * BATCHES * 2)
    assert world.facts()["agents_lost"] == 1
    assert world.ask("check") == "True"


def test_the_next_hostd_puts_back_what_a_killed_one_left(world):
    limit = world.limit()
    world.manage("static", limit_mib=100)
    world.until(lambda: world.limit() == 100)
    world.hostd.kill()
    world.hostd.wait()
    world.manage("static", limit_mib=0)
    world.until(lambda: world.facts())
    assert world.limit() == limit


def test_a_policy_of_another_subsystem_ends_hostd_with_the_agents_status(world):
    limit = world.limit()
    world.manage("fifo")
    assert world.hostd.wait(DEADLINE_S) == 3
    assert world.limit() == limit


def test_a_limit_goes_when_its_agent_is_killed_comes_with_the_next_and_goes_with_hostd(world):
    limit = world.limit()
    world.manage("static", limit_mib=100)
    world.until(lambda: world.limit() == 100)
    first = world.agent()
    os.kill(first, signal.SIGKILL)
    world.until(lambda: world.facts()["agents_lost"] == 1 and world.limit() == 100)
    assert world.agent() != first
    world.hostd.terminate()
    assert world.hostd.wait(DEADLINE_S) == 0
    assert world.limit() == limit
    assert world.ask("check") == "True"


def test_a_limit_goes_while_its_agent_hangs_and_comes_back_with_its_first_sign_of_life(world):
    limit = world.limit()
    world.manage("static", "--setting", "silent_s=1", limit_mib=100)
    world.until(lambda: world.limit() == 100)
    agent = world.agent()
    os.kill(agent, signal.SIGSTOP)
    world.until(lambda: world.limit() == limit)
    os.kill(agent, signal.SIGCONT)
    world.until(lambda: world.limit() == 100)
    assert world.facts()["counters"]["silences"] >= 1
    assert world.agent() == agent


def test_another_policy_takes_over_and_one_of_another_subsystem_does_not(world):
    full = world.rss_mib()
    world.manage("static", limit_mib=0)
    world.until(lambda: world.agent())
    refused = ask(world.enclave, {"do": "set-policy", "policy": "fifo"}, DEADLINE_S)
    assert "another subsystem" in refused["error"]
    taken = ask(world.enclave, {"do": "set-policy", "policy": "region_age", "params": AGE}, DEADLINE_S)
    assert (taken["ok"], taken["policy"], taken["was"]) == (True, "region_age", "static")
    world.until(lambda: world.rss_mib() < full - 0.2 * BATCHES * 2)
    assert world.facts()["agents_lost"] == 0


def test_a_cgroup_has_one_enclave(world):
    world.manage("static", limit_mib=0)
    world.until(lambda: world.facts())
    command = [sys.executable, "-P", *WAVE, "hostd", "--subsystem", "memory", "--enclave", f"{world.enclave}-2", "--cgroup", str(world.cgroup)]
    told = subprocess.run([*command, "--no-agent"], capture_output=True, text=True)
    assert told.returncode == 2
    assert f"cgroup {world.cgroup} belongs to the enclave '{world.enclave}'" in told.stderr


def test_a_process_that_ends_is_forgotten_and_hostd_ends_when_the_cgroup_is_removed(world):
    world.manage(**AGE)
    world.until(lambda: world.facts() and world.facts()["counters"]["regions"])
    world.application.kill()
    world.application.wait()
    end = time.monotonic() + DEADLINE_S
    while world.facts()["counters"]["processes"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    world.cgroup.rmdir()
    assert world.hostd.wait(DEADLINE_S) == 0


def test_an_agent_on_another_machine_decides_over_zmq_and_a_limit_goes_when_it_is_lost(world, tmp_path):
    host, dpu = Keys(tmp_path / "host"), Keys(tmp_path / "dpu")
    host.add("dpu", dpu.new().public)
    dpu.add("h1", host.new().public)
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        url = f"zmq+tcp://127.0.0.1:{asked.getsockname()[1]}"
    limit = world.limit()
    world.manage(None)
    agent = world.wave("agentd", url, "static", "--param", "limit_mib=100", keys=dpu)
    world.wave("relay", world.enclave, url, "--subsystem", "memory", keys=host)
    world.until(lambda: world.limit() == 100)
    assert world.facts()["report"]["policy"] == "static"
    agent.kill()
    agent.wait()
    world.until(lambda: world.limit() == limit)
    full = world.rss_mib()
    world.wave("agentd", url, "region_age", *(word for name, value in AGE.items() for word in ("--param", f"{name}={value}")), keys=dpu)
    world.until(lambda: world.rss_mib() < full - 0.2 * BATCHES * 2)
    assert world.ask("check") == "True"


RESTLESS = """
from waveos import memory
from waveos.policy import Policy


class Restless(Policy, subsystem=memory, name="restless", compiled=False):
    '''Moves everything out and back, and the limit up and down, all the time.'''

    def start(self):
        self.regions, self.step = {}, 0

    def region_mapped(self, msg, txns):
        self.regions[msg.region] = msg
        txns.wake_after(10_000_000)

    def region_unmapped(self, msg, txns):
        self.regions.pop(msg.region, None)

    def timer_expired(self, msg, txns):
        self.step += 1
        memory.limit(txns, (0, 100 << 20, 130 << 20)[self.step % 3])
        for each in self.regions.values():
            move = memory.reclaim if self.step % 2 else memory.bring_back
            for first in range(0, each.count, 64):
                move(txns, each.region, first, (1 << min(64, each.count - first)) - 1, 1 << 40)
        txns.wake_after(10_000_000)
"""


@pytest.mark.slow
def test_whoever_is_killed_at_whatever_moment_no_limit_stays_and_no_page_is_lost(world, tmp_path):
    limit, choice = world.limit(), random.Random(5)
    path = tmp_path / "restless.py"
    path.write_text(RESTLESS)
    for victim in ("hostd", "agent", "hostd", "agent", "both"):
        world.manage(f"{path}:Restless")
        world.until(lambda: world.facts().get("counters", {}).get("advised_kib", {}).get("pageout", 0) > 0)
        end = time.monotonic() + choice.random() / 2
        while time.monotonic() < end:
            world.ask("touch")
        if victim != "hostd" and (agent := world.agent()):
            os.kill(agent, signal.SIGKILL)
        if victim == "agent":
            world.until(lambda: world.facts()["agents_lost"] > 0)
            world.hostd.terminate()
            assert world.hostd.wait(DEADLINE_S) == 0
        else:
            world.hostd.kill()
            world.hostd.wait()
            assert restore([world.enclave])[1] == []
        assert world.limit() == limit
        assert world.ask("check") == "True"
        assert world.application.poll() is None
