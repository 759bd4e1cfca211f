"""Run by a service of a real systemd, in a guest: installs the units, starts them, kills what they run, and writes down what became of it as JSON.

    python in_guest.py FILE

Two processes compute in an enclave from the begin to the end; that they go on is seen by their CPU time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
WAVE = ROOT / ".venv" / "bin" / "wave"
HOSTD, AGENTD, ADMIN = "wave-hostd@web.service", "wave-agentd@web.service", "wave-admin.service"
PATIENCE_S = 600.0
FOUND: dict[str, Any] = {}
SLOW = "[Service]\nWatchdogSec=200\nTimeoutStartSec=900\nTimeoutStopSec=300\n"
WORKER = "import time\nwhile True:\n for _ in range(2_000): pass\n time.sleep(0.01)"


def do(*command: str | Path, check: bool = True) -> str:
    print(f"{time.monotonic():.0f} s: {' '.join(map(str, command))}", flush=True)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{command}: {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def until(condition: Callable[[], Any], what: str) -> Any:
    print(f"{time.monotonic():.0f} s: {what}?", flush=True)
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"never: {what}")
        time.sleep(0.3)
    return found


def shown(unit: str, *properties: str) -> list[str]:
    out = subprocess.run(
        ["systemctl", "show", unit, *(f"--property={each}" for each in properties)], capture_output=True, text=True, check=False
    ).stdout
    told = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    return [told.get(each, "") for each in properties]


def pid(unit: str) -> int:
    return int(shown(unit, "MainPID")[0] or 0)


def status() -> dict[str, Any]:
    """What hostd says, asked at its own door: a command takes an emulated processor a quarter of a minute. {} while there is no answer."""
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as line:
        line.settimeout(PATIENCE_S)
        line.connect("/run/wave/web/control.sock")
        line.sendall(b'{"do": "status"}\n')
        with line.makefile() as answer:
            told: dict[str, Any] = json.loads(answer.readline())
            return told
    return {}


def cpu_ticks(pids: list[int]) -> list[int]:
    return [sum(map(int, Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[11:13])) for each in pids]


def attached(times: int) -> dict[str, Any]:
    def there() -> dict[str, Any]:
        told = status()
        return told if told.get("agent") and told["attachments"] >= times else {}

    return until(there, f"the agent is attached for the {times}. time")


def goes_on(pids: list[int]) -> bool:
    before = cpu_ticks(pids)
    until(lambda: all(now > then for now, then in zip(cpu_ticks(pids), before, strict=True)), "the members run")
    return True


def policies_of(pids: list[int]) -> list[tuple[int, int]]:
    return [(os.sched_getscheduler(each), os.getpriority(os.PRIO_PROCESS, each)) for each in pids]


def main() -> None:
    for folder in ("/root", ROOT):
        os.chmod(folder, 0o755)  # the guest's own: the agent's user runs this checkout's Python
    do("env", "PREFIX=/usr", ROOT / "systemd" / "install", "host")
    workers = [subprocess.Popen([sys.executable, "-S", "-c", WORKER]) for _ in range(2)]
    pids = [each.pid for each in workers]
    before = policies_of(pids)
    settings = [
        f"pids = {pids}",
        'cpus = "1"',
        'policy = "fifo"',
        'mechanism = "sched_ext"',
        "[hostd]",
        "cpu = 0",
        "priority = 0",
    ]  # real-time it would keep an emulated systemd from answering
    settings += ["[settings]", "silent_ms = 3000", "default_ms = 2000"]
    Path("/etc/wave/enclaves/web.toml").write_text("\n".join(settings) + "\n")
    Path("/etc/wave/agents/web.env").write_text("WAVE_AGENT_OPTIONS=--idle-us 1\n")
    Path("/etc/systemd/system/wave-agentd@.service.d").mkdir(parents=True)
    # What was compiled outside is found in here: an emulated processor takes minutes for it.
    for source, target in ((os.environ["WAVE_COMPILED"], "numba"), (os.environ["WAVE_POLICIES"], "waveos/policies")):
        newest = max(Path(source).iterdir(), key=lambda path: path.stat().st_mtime) if target == "numba" else Path(source)
        shutil.copytree(newest, Path("/var/cache/wave-agentd", target, *([newest.name] if target == "numba" else [])))
    do("chown", "-R", "wave-agent:wave-agent", "/var/cache/wave-agentd")
    drop_in = "[Service]\nEnvironment=NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=\n" + SLOW.removeprefix("[Service]\n")
    Path("/etc/systemd/system/wave-agentd@.service.d/guest.conf").write_text(drop_in)
    for unit in ("wave-hostd@.service", "wave-admin.service"):
        Path(f"/etc/systemd/system/{unit}.d").mkdir(parents=True)
        Path(f"/etc/systemd/system/{unit}.d/guest.conf").write_text(SLOW)
    do("systemctl", "daemon-reload")

    print(f"{time.monotonic():.0f} s: installed", flush=True)
    do("systemctl", "start", HOSTD, ADMIN)
    FOUND["started"] = [shown(unit, "ActiveState", "SubState") for unit in (HOSTD, ADMIN)]
    do("systemctl", "start", AGENTD)
    first = attached(1)
    hostd, agentd, admin = pid(HOSTD), pid(AGENTD), pid(ADMIN)
    FOUND["users"] = {unit: Path(f"/proc/{number}").stat().st_uid for unit, number in ((HOSTD, hostd), (AGENTD, agentd), (ADMIN, admin))}
    FOUND["agent"] = first["agent"]["pid"] == agentd
    FOUND["sockets"] = {name: oct(Path(f"/run/wave-admin/{name}.sock").stat().st_mode & 0o777) for name in ("read", "control")}
    FOUND["asked"] = json.loads(do(WAVE, "status", "web", "--json"))["agent"]["pid"] == agentd
    FOUND["sched_ext"] = Path("/sys/kernel/sched_ext/state").read_text().strip()

    os.kill(agentd, signal.SIGKILL)
    again = attached(first["attachments"] + 1)
    FOUND["agent killed"] = {
        "restarted": pid(AGENTD) not in (0, agentd) and again["agent"]["pid"] == pid(AGENTD),
        "restarts": int(shown(AGENTD, "NRestarts")[0]),
        "hostd is the same": pid(HOSTD) == hostd,
        "members": goes_on(pids),
        "lost": again["agents_lost"] - first["agents_lost"],
    }

    os.kill(agentd_pid := pid(AGENTD), signal.SIGSTOP)
    FOUND["agent stopped"] = {"members": goes_on(pids)}
    os.kill(agentd_pid, signal.SIGCONT)

    os.kill(hostd, signal.SIGKILL)
    until(lambda: pid(HOSTD) not in (0, hostd), "hostd is started again")
    attached(1)
    FOUND["hostd killed"] = {"restarts": int(shown(HOSTD, "NRestarts")[0]), "members": goes_on(pids)}

    FOUND["drained"] = do(WAVE, "drain", "web").strip()
    until(lambda: shown(HOSTD, "ActiveState") == ["inactive"], "hostd has ended for good")
    FOUND["after"] = {"as before": policies_of(pids) == before, "left": sorted(path.name for path in Path("/run/wave").iterdir())}
    FOUND["after"]["sched_ext"] = Path("/sys/kernel/sched_ext/state").read_text().strip()

    # A hostd that is killed for good: nobody starts it again, and what it had changed is put back all the same.
    Path("/run/systemd/system/wave-hostd@.service.d").mkdir(parents=True)
    Path("/run/systemd/system/wave-hostd@.service.d/once.conf").write_text("[Service]\nRestart=no\n")
    do("systemctl", "daemon-reload")
    do("systemctl", "start", HOSTD)
    os.kill(pid(HOSTD), signal.SIGKILL)
    until(lambda: shown(HOSTD, "ActiveState") == ["failed"], "hostd has failed")
    FOUND["killed for good"] = {"as before": policies_of(pids) == before, "left": sorted(path.name for path in Path("/run/wave").iterdir())}
    for each in workers:
        each.kill()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        FOUND["error"] = f"{type(error).__name__}: {error}"
        FOUND["log"] = do("journalctl", "--no-pager", "-o", "cat", "-n", "60", check=False)
    Path(sys.argv[1]).write_text(json.dumps(FOUND))
