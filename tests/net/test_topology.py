"""Networks come up, go down, and leave nothing, also after a crash of what made them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
