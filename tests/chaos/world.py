"""A real enclave to torment: workers, hostd and agents as processes of this machine, and the means to see that nothing is lost and nothing is left."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from waveos.host.sched import attributes
from waveos.process import start_time

HERE = Path(__file__).parent
WORKERS = HERE / "workers.py"
WORDS, SLOTS = 8, 32
COUNT, LAST, GAP = range(3)
PATIENCE_S = 60.0
STILL_S = 20.0
"""A worker that makes no step for so long is stuck."""
_HELD = re.compile(r"^(prog|map|link)_id:\s*(\d+)", re.MULTILINE)


def why_not() -> str | None:
    """Why the live world cannot be tormented here."""
    if os.geteuid():
        return "needs root"
    if not Path("/sys/kernel/btf/vmlinux").exists():
        return "this kernel has no BTF"
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two CPUs: one for the enclave, one for its agent"
    if not (HERE.parents[1] / "host/sched/priority.bpf.o").exists():
        return "the BPF programs are not compiled: make bpf"
    return None


def until(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Wait for something to be true; what it was."""
    end = time.monotonic() + patience_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"never: {what}")
        time.sleep(0.002)
    return found


def scheduling(pid: int) -> dict[int, tuple[Any, ...]]:
    """How each thread of a process is scheduled, as far as it can be changed."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            found[int(name)] = (attributes.read(int(name)), tuple(attributes.affinity(int(name))))
    return found


def bpf_objects() -> set[tuple[str, int]]:
    """Programs, maps and links in this kernel that no process but this one holds open, as (kind, id)."""
    found = set()
    for kind in ("prog", "map", "link"):
        told = subprocess.run(["bpftool", "--json", kind, "show"], capture_output=True, text=True, check=False).stdout
        found |= {(kind, each["id"]) for each in json.loads(told or "[]")}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                for file in (folder / "fdinfo").iterdir():
                    with contextlib.suppress(OSError):
                        found -= {(kind, int(number)) for kind, number in _HELD.findall(file.read_text())}
    return found


def stopped(pid: int) -> bool:
    """Somebody has stopped the process, and not us."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def stolen_ms(cpu: int) -> float:
    """What the hypervisor has taken of that CPU so far."""
    fields = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith(f"cpu{cpu} ")).split()
    return float(fields[8]) * 1_000 / os.sysconf("SC_CLK_TCK")


class Worker:
    """One process with a slot in the shared words."""

    def __init__(self, kind: str, number: int, process: subprocess.Popen[Any]) -> None:
        self.kind, self.number, self.process = kind, number, process
        self.pid = process.pid

    @property
    def name(self) -> str:
        return f"{self.kind} {self.number}"


class World:
    """Everything of one torment, in a folder of its own. `close` ends whatever is left, and leaves the machine as it was."""

    def __init__(self, name: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="wave-chaos-"))
        self.run = self.folder / "run"
        self.run.mkdir()
        self.name = name or f"chaos-{os.getpid()}"
        self.environment = {**os.environ, "WAVE_RUN": str(self.run), "NO_COLOR": "1", "WAVE_CHAOS": str(self.folder)}
        self.cpus = sorted(os.sched_getaffinity(0))
        self._fd = os.memfd_create("progress")
        os.ftruncate(self._fd, 8 * WORDS * SLOTS)
        self.words = memoryview(mmap.mmap(self._fd, 8 * WORDS * SLOTS)).cast("q")
        self.workers: list[Worker] = []
        self.over = False
        """Nobody watches any more."""
        self._processes: list[subprocess.Popen[Any]] = []
        self._next = 1
        self._logs = 0

    def start(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        """A process that `close` ends, if nobody does before."""
        process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, **options)
        self._processes = [each for each in self._processes if each.poll() is None] + [process]
        return process

    def worker(self, kind: str, *arguments: str, fds: tuple[int, ...] = ()) -> Worker:
        """One that begins to work at once."""
        number, self._next = self._next, self._next + 1
        command = [sys.executable, "-S", "-E", str(WORKERS), kind, str(self._fd), str(number), *arguments]
        made = Worker(kind, number, self.start(command, pass_fds=[self._fd, *fds]))
        self.workers.append(made)
        return made

    def pair(self) -> tuple[Worker, Worker]:
        """Two that wake each other."""
        (read_a, write_b), (read_b, write_a) = os.pipe(), os.pipe()
        try:
            return self.worker("ping", str(read_a), str(write_a), "1", fds=(read_a, write_a)), self.worker(
                "ping", str(read_b), str(write_b), "0", fds=(read_b, write_b)
            )
        finally:
            for fd in (read_a, write_a, read_b, write_b):
                os.close(fd)

    def word(self, worker: Worker, which: int) -> int:
        """One of the worker's words."""
        return self.words[WORDS * worker.number + which]

    def forget_gaps(self) -> None:
        """From now on the longest pauses are counted anew."""
        for worker in self.workers:
            self.words[WORDS * worker.number + GAP] = 0

    def daemon(self, command: str, *arguments: str, log: str) -> subprocess.Popen[Any]:
        """`wave hostd` or `wave agentd`, which talks to a log."""
        code = f"import sys; from waveos.cli import run; sys.exit(run(['{command}', *sys.argv[1:]]))"
        with (self.folder / log).open("ab") as file:
            return self.start([sys.executable, "-P", "-c", code, *arguments], stderr=file)

    def hostd(self, *arguments: str, log: str = "hostd.log", members: str | None = None) -> subprocess.Popen[Any]:
        """A hostd for the workers, on the first CPU."""
        who = members if members is not None else ",".join(str(each.pid) for each in self.workers)
        base = ["--enclave", self.name, "--cpus", str(self.cpus[0]), "--mechanism", "priority", *(["--pids", who] if who else [])]
        return self.daemon("hostd", *base, *arguments, log=log)

    def agent(self, policy: str | None = "shinjuku", *arguments: str, log: str = "agentd.log") -> subprocess.Popen[Any]:
        """An agent for the enclave, on the second CPU; one that comes while another is there waits."""
        url = f"shm://{self.run}/{self.name}/agent.sock"
        return self.daemon("agentd", url, *([policy] if policy else []), "--core", str(self.cpus[1]), *arguments, log=log)

    def restore(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`wave restore`."""
        code = "import sys; from waveos.cli import run; sys.exit(run(['restore', *sys.argv[1:]]))"
        command = [sys.executable, "-P", "-c", code, *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)

    def ask(self, do: str, timeout_s: float = 5.0, **request: Any) -> dict[str, Any] | None:
        """Ask hostd; None if it is not there, or does not answer."""
        from waveos.errors import WaveError
        from waveos.host import doors, restore

        usual, restore.RUN = restore.RUN, self.run
        try:
            return doors.ask(self.name, {"do": do, **request}, timeout_s)
        except (WaveError, OSError, ValueError):
            return None
        finally:
            restore.RUN = usual

    def attached(self) -> int | None:
        """The agent that decides now."""
        told = self.ask("status", 1.0)
        return told["agent"]["pid"] if told and told.get("agent") else None

    def log(self, name: str) -> str:
        """What a daemon said so far."""
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""

    def left(self) -> list[str]:
        """What is still there of it that should not be, but for living workers."""
        found = [f"{path.relative_to(self.run)} in the folder of enclaves" for path in self.run.rglob("*")]
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and int(folder.name) not in {each.pid for each in self.workers}:
                with contextlib.suppress(OSError):
                    if f"WAVE_CHAOS={self.folder}".encode() in (folder / "environ").read_bytes() and start_time(int(folder.name)) is not None:
                        found.append(f"process {folder.name} ({(folder / 'comm').read_text().strip()})")
        return found

    def close(self) -> None:
        """End everything, by its number."""
        self.over = True
        self.words[0] = 1
        for process in reversed(self._processes):
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGCONT)
            if process.pid not in {each.pid for each in self.workers}:
                process.kill()
                process.wait()
        self.restore()
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
        os.close(self._fd)
        shutil.rmtree(self.folder, ignore_errors=True)


class Watch(threading.Thread):
    """Looks at every worker's progress, all the time."""

    def __init__(self, world: World) -> None:
        super().__init__(daemon=True)
        self.world, self.stuck = world, ""
        self.longest_ms: dict[str, float] = {}
        self.start()

    def run(self) -> None:
        seen: dict[str, tuple[int, float]] = {}
        before = time.monotonic()
        while not self.world.over:
            now = time.monotonic()
            late, before = now - before > 1.0, now  # who watches stood still: that is no news of the watched
            for worker in self.world.workers:
                count = self.world.word(worker, COUNT)
                last, since = seen.get(worker.name, (-1, now))
                if count != last or late or stopped(worker.pid):
                    seen[worker.name] = (count, now)
                    since = since if count != last else now
                self.longest_ms[worker.kind] = max(self.longest_ms.get(worker.kind, 0.0), (now - since) * 1_000)
                if now - since > STILL_S and not self.stuck:
                    state = scheduling(worker.pid)
                    self.stuck = f"{worker.name} (pid {worker.pid}) stands still at {count} for {now - since:.1f} s: {state}"
            time.sleep(0.01)
