"""Networks come up, go down, and leave nothing, also after a crash of what made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "xsk"))
from wire import why_not

from waveos.errors import ConfigError
from waveos.host.net import topology

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces want root")


def spaces(name: str) -> list[str]:
    return sorted(path.name for path in topology.FOLDER.glob(f"{name}-*")) if topology.FOLDER.is_dir() else []


def test_a_network_is_three_namespaces_and_goes_without_a_trace() -> None:
    name = f"test-top-{os.getpid()}"
    with topology.network(name) as made:
        assert spaces(name) == [f"{name}-client", f"{name}-host", f"{name}-ipu"]
        assert name in topology.names()
        found = topology.find(name)
        assert (found.client, found.host) == (made.client, made.host)
        with pytest.raises(ConfigError, match="already a namespace"):
            topology.up(name)
    assert spaces(name) == []
    assert name not in topology.names()


def test_a_network_that_was_left_by_a_killed_process_is_taken_down() -> None:
    name = f"test-kill-{os.getpid()}"
    script = f"from waveos.host.net import topology; import os, signal; topology.up({name!r}); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-P", "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(spaces(name)) == 3
    assert len(topology.down(name)) == 3
    assert spaces(name) == []


@pytest.mark.parametrize("name", ["", "a/b", "-x", "x" * 60])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a network"):
        topology.up(name)


def test_a_network_that_is_not_up_cannot_be_taken_down() -> None:
    with pytest.raises(ConfigError, match="not up"):
        topology.down("never-made")


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_service_is_started_and_asked_from_the_command_line() -> None:
    import json

    wave = [sys.executable, "-P", "-c", "from waveos.cli import main; main()", "net"]
    with topology.network(f"test-load-{os.getpid()}") as made:
        flags = ["--workers", "2", "--get-us", "50", "--range-us", "500"]
        with subprocess.Popen([*wave, "serve", made.name, *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as service:
            assert service.stdout is not None
            pids = [int(pid) for pid in service.stdout.readline().split(",")]
            load = ["load", made.name, "--rate", "200", "--seconds", "0.5", "--range-share", "0.2", "--json"]
            done = subprocess.run([*wave, *load], capture_output=True, text=True, check=False, timeout=120)
            service.send_signal(signal.SIGINT)
            assert service.wait(60) == 130
        assert len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)
    rows = json.loads(done.stdout)
    assert [row["class"] for row in rows] == ["GET", "RANGE"] and all(row["sent"] > 0 == row["unanswered"] for row in rows), done.stderr


def test_the_command_makes_lists_and_removes() -> None:
    name = f"test-cli-{os.getpid()}"
    wave = [sys.executable, "-P", "-m", "waveos.cli"]
    if not (Path(topology.__file__).parents[2] / "cli" / "__main__.py").exists():
        wave = [sys.executable, "-P", "-c", "from waveos.cli import main; main()"]
    try:
        up = subprocess.run([*wave, "net", "up", name], capture_output=True, text=True, check=False)
        assert up.returncode == 0, up.stderr
        assert name in subprocess.run([*wave, "net", "list"], capture_output=True, text=True, check=False).stdout
        again = subprocess.run([*wave, "net", "up", name], capture_output=True, text=True, check=False)
        assert again.returncode != 0 and again.stderr.count("\n") == 1
    finally:
        down = subprocess.run([*wave, "net", "down", name], capture_output=True, text=True, check=False)
    assert down.returncode == 0 and spaces(name) == []
