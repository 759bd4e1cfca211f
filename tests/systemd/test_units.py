"""systemd's part: what the units may, that systemd understands them, that they are installed and taken away, and that a real systemd runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from waveos import notify
from waveos.errors import ConfigError, MissingError
from waveos.keys import Keys
from waveos.paths import cache_dir

ROOT = Path(__file__).parents[2]
UNITS = ("wave-hostd@.service", "wave-agentd@.service", "wave-relay@.service", "wave-admin.service", "wave-metrics.service")
SERIES = [series for series in os.environ.get("WAVE_GUESTS", "").split(",") if series]
ANALYZE = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")


def make(target: str, folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", str(ROOT), target, f"DESTDIR={folder}", *more], capture_output=True, text=True, check=False)


def installed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units of the host's half, as this machine's systemd is to read them."""
    folder = tmp_path_factory.mktemp("host")
    assert make("install-units-host", folder, "WAVE=/bin/true").returncode == 0
    return folder / "usr/local/lib/systemd/system"


@ANALYZE
@pytest.mark.parametrize(
    ("unit", "most"), [("wave-hostd@.service", 4.0), ("wave-agentd@.service", 1.5), ("wave-admin.service", 2.0), ("wave-metrics.service", 2.0)]
)
def test_a_unit_is_exposed_no_more_than_it_has_to(host, unit, most):
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", str(host / unit)], capture_output=True, text=True, check=False)
    exposed = float(re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1])
    assert exposed <= most


@ANALYZE
def test_the_agent_of_the_dpu_is_exposed_no_more_than_it_has_to(tmp_path):
    assert make("install-units-dpu", tmp_path, "WAVE=/bin/true").returncode == 0
    unit = tmp_path / "usr/local/lib/systemd/system/wave-agentd@.service"
    done = subprocess.run(["systemd-analyze", "security", "--offline=true", str(unit)], capture_output=True, text=True, check=False)
    assert float(re.search(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)[1]) <= 1.5


@ANALYZE
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_understands_all_of_a_unit(host, tmp_path, unit):
    version = int(re.search(r"systemd (\d+)", subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout)[1])
    for name in UNITS:
        shutil.copy(host / name, tmp_path / name)
        if version >= 254:
            shutil.copytree(host / f"{name}.d", tmp_path / f"{name}.d")
    instance = unit.replace("@.", "@web.")
    surroundings = {**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    done = subprocess.run(["systemd-analyze", "verify", instance], cwd=tmp_path, env=surroundings, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_hostd_compiles_nothing_and_may_therefore_not():
    code = "import sys, waveos.host.hostd, waveos.host.sched.hosted, waveos.host.memory.hosted, waveos.host.restore; print('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert "\nMemoryDenyWriteExecute=yes" in (ROOT / "systemd/wave-hostd@.service").read_text()
    assert "\nMemoryDenyWriteExecute" not in (ROOT / "systemd/wave-agentd@.service").read_text()


def test_the_halves_are_installed_apart_and_both_are_taken_away(tmp_path):
    assert make("install-units-dpu", tmp_path, "PREFIX=/usr", "WAVE=/opt/wave/bin/wave").returncode == 0
    dpu = installed(tmp_path)
    assert "usr/lib/systemd/system/wave-agentd@.service.d/network.conf" in dpu
    assert not any("hostd" in path or "admin" in path for path in dpu)
    unit = (tmp_path / "usr/lib/systemd/system/wave-agentd@.service").read_text()
    assert "ExecStart=/opt/wave/bin/wave agentd" in unit and "ProtectHome=yes" in unit and "@WAVE@" not in unit
    assert make("install-units-host", tmp_path, "PREFIX=/usr", "WAVE=/opt/wave/bin/wave").returncode == 0
    assert {f"usr/lib/systemd/system/{name}" for name in UNITS} < installed(tmp_path)
    assert make("uninstall-units", tmp_path, "PREFIX=/usr").returncode == 0
    assert installed(tmp_path) == set()


def test_what_cannot_be_installed_is_said_in_one_line(tmp_path):
    done = make("install-units-host", tmp_path, "WAVE=bin/wave")
    assert done.returncode and "systemd wants the whole path" in done.stderr.splitlines()[0]
    said = subprocess.run([ROOT / "systemd/install", "somewhere"], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (2, "install-units: say host, dpu, all or remove\n")


def test_what_a_restart_cannot_mend_is_not_started_again():
    for unit in set(UNITS) - {"wave-hostd@.service"}:
        assert f"\nRestartPreventExitStatus={ConfigError.exit_code} {MissingError.exit_code}\n" in (ROOT / "systemd" / unit).read_text()


@pytest.mark.skipif(not shutil.which("systemd-tmpfiles") or os.geteuid() != 0, reason="no systemd-tmpfiles here, or not root")
def test_keys_that_root_made_before_the_units_were_installed_become_the_agents(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\nwave-agent:x:990:990::/:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nwave-agent:x:990:\n")
    keys = Keys(tmp_path / "etc/wave/keys")
    before = os.umask(0o077)
    try:
        keys.add("dpu", keys.new().public)
    finally:
        os.umask(before)
    (tmp_path / "usr/lib/tmpfiles.d").mkdir(parents=True)
    shutil.copy(ROOT / "systemd/tmpfiles-agent.conf", tmp_path / "usr/lib/tmpfiles.d/wave-agent.conf")
    done = subprocess.run(["systemd-tmpfiles", f"--root={tmp_path}", "--create"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = {path.name: path.stat() for path in (keys.folder, *keys.folder.rglob("*"))}
    assert {name: (stat.S_IMODE(each.st_mode), each.st_uid) for name, each in found.items()} == {
        "keys": (0o700, 990),
        "own.toml": (0o600, 990),
        "peers": (0o700, 990),
        "dpu.toml": (0o600, 990),
    }


def test_systemd_is_told_that_it_is_ready_alive_and_stops(tmp_path, monkeypatch):
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1000")
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        fresh = type("_Line", (), {"socket": None, "looked": False, "every_s": 0.0, "next_s": 0.0})
        monkeypatch.setattr(notify, "_Line", fresh)
        notify.ready("here")
        assert "NOTIFY_SOCKET" not in os.environ, "children do not speak for us"
        notify.alive()
        notify.stopping()
        assert [systemd.recv(100) for _ in range(3)] == [b"READY=1\nSTATUS=here", b"WATCHDOG=1", b"STOPPING=1"]
        fresh.socket.close()


@pytest.mark.parametrize("series", SERIES or [pytest.param("", marks=pytest.mark.skip(reason="boots a guest: WAVE_GUESTS=6.17 says which kernel"))])
def test_a_real_systemd_runs_them_and_whoever_is_killed_the_enclave_goes_on(series, tmp_path):
    sys.path.insert(0, str(ROOT / "tests/vm"))
    import kernels
    import machine

    compiled = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-P", str(ROOT / "tests/vm/compiled.py")], env={**os.environ, **compiled}, check=True)
    (tmp_path / "guest").mkdir()
    share = tmp_path / "guest"
    caches = {"WAVE_COMPILED": os.environ.get("NUMBA_CACHE_DIR") or str(cache_dir("compiled")), "WAVE_POLICIES": str(cache_dir("policies"))}
    surroundings = {**compiled, **caches}
    command = [sys.executable, "-P", str(ROOT / "tests/systemd/in_guest.py"), str(share / "found")]
    ended = machine.run(kernels.kernel(series), command, timeout_s=1_500, share=share, environment=surroundings, systemd=True)
    assert (share / "found").exists(), f"{ended}\n{ended.output[-3000:]}\n{ended.console[-3000:]}"
    found = json.loads((share / "found").read_text())
    assert "error" not in found, f"{found['error']}\n{found['log']}"
    assert found["started"] == [["active", "running"]] * 2
    assert found["users"]["wave-hostd@web.service"] == 0 and 0 not in list(found["users"].values())[1:]
    assert found["agent"] and found["asked"] and found["sockets"] == {"read": "0o660", "control": "0o600"} and found["sched_ext"] == "enabled"
    assert found["agent killed"] == {"restarted": True, "restarts": 1, "hostd is the same": True, "members": True, "lost": 1}
    assert found["agent stopped"] == {"members": True}
    assert found["hostd killed"] == {"restarts": 1, "members": True}
    assert found["drained"] == "web: drained; everything is as it was"
    assert found["after"] == {"as before": True, "left": [], "sched_ext": "disabled"}
    assert found["killed for good"] == {"as before": True, "left": []}
