"""`wave hostd` for the network: it opens the ports, an agent without privilege serves them; either may die, and so may a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "xsk"))
from wire import why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
PORT, WORKERS = 5_000, 3
PATIENCE_S = 60.0


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[Any]:
    from waveos.host.net import topology
    from waveos.host.net.client import Client
    from waveos.host.net.service import UdpService

    times = [np.full(10, 50_000, np.int64), np.full(10, 1_000_000, np.int64)]
    with (
        topology.network(f"test-host-{os.getpid()}") as network,
        UdpService(network, port=PORT, workers=WORKERS, times_ns=times) as service,
        Client(network, PORT) as client,
    ):
        yield network, service, client


@contextlib.contextmanager
def hostd(network: Any, pids: list[int], *flags: str) -> Iterator[Any]:
    """A daemon that ends with the `with`; its process."""
    command = [sys.executable, "-P", "-c", "from waveos.cli import main; main()", "hostd", "--enclave", network.name, "--subsystem", "net"]
    command += ["--pids", ",".join(map(str, pids)), *(["--policy", "jbsq"] if "--no-agent" not in flags else []), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def status(name: str) -> dict[str, Any] | None:
    from waveos.errors import WaveError
    from waveos.host import doors

    with contextlib.suppress(WaveError, OSError):  # it may be about to end
        return doors.ask(name, {"do": "status"})
    return None


def serving(name: str) -> dict[str, Any]:
    """Its status, once an agent serves."""

    def look() -> dict[str, Any] | None:
        told = status(name)
        return told if told and told["agent"] and told["counters"]["serving"] else None

    return wait_for(look)  # type: ignore[no-any-return]


def send(client: Any, rate: float = 300, seconds: float = 0.3) -> Any:
    from waveos.host.net.client import draw_plan

    return client.run(draw_plan(rate, seconds, 0.1, flows=64, slo_us=(2_000, 20_000), seed=1), patience_s=PATIENCE_S)


def redirected(name: str) -> int:
    told = status(name)
    return int(told["counters"]["client_redirected"]) if told else 0


def test_hostd_serves_a_network_through_an_agent_that_may_be_killed_and_told_another_policy(world: Any) -> None:
    network, service, client = world
    with hostd(network, service.pids) as process:
        first = serving(network.name)["agent"]["pid"]
        assert send(client).unanswered == 0 and redirected(network.name) > 0
        capabilities = Path(f"/proc/{process.pid}/status").read_text()
        assert "numba" not in Path(f"/proc/{process.pid}/maps").read_text(), "hostd has no compiler in it"
        assert "CapEff:\t000001ffffffffff" not in capabilities

        os.kill(first, signal.SIGKILL)
        wait_for(lambda: (told := status(network.name)) and (told["agent"] or {}).get("pid") != first)
        assert send(client).unanswered == 0, "the kernel's path, or the next agent"
        assert serving(network.name)["agent"]["pid"] != first
        before = redirected(network.name)
        wait_for(lambda: send(client).unanswered == 0 and redirected(network.name) > before)

        from waveos.host import doors

        told = doors.ask(network.name, {"do": "set-policy", "policy": "net_round_robin", "params": {}}, timeout_s=PATIENCE_S)
        assert told["ok"] and told["policy"] == "net_round_robin" and told["was"] == "jbsq"
        before = redirected(network.name)
        wait_for(lambda: send(client).unanswered == 0 and redirected(network.name) > before)
        refused = doors.ask(network.name, {"do": "set-policy", "policy": "fifo", "params": {}}, timeout_s=PATIENCE_S)
        assert not refused["ok"] and "not one of the network's" in refused["error"]
        wait_for(lambda: send(client).unanswered == 0)
    from waveos.host.restore import names

    assert network.name not in names(), "nothing is left"
    assert send(client).unanswered == 0


def test_a_hostd_that_is_killed_leaves_the_kernels_path_and_what_restore_knows(world: Any) -> None:
    from waveos.host.net import topology
    from waveos.host.restore import names, restore
    from waveos.process import start_time

    network, service, client = world
    with hostd(network, service.pids) as process:
        agent = serving(network.name)["agent"]["pid"]
        began = start_time(agent)
        process.kill()
        process.wait()
        wait_for(lambda: start_time(agent) != began)
        assert send(client).unanswered == 0
        assert network.name in names()
        _, failed = restore([network.name])
        assert not failed and network.name not in names()
        assert topology.find(network.name) == network


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--setting", "prot=5000"], "no setting 'prot'.*port"),
        (["--setting", "port=70000"], "UDP port"),
        (["--pids", "4194300"], "no process 4194300"),
        (["--cpus", "0"], "cpus is for scheduling"),
    ],
)
def test_what_cannot_be_served_is_one_line(world: Any, flags: list[str], what: str) -> None:
    import re

    network, service, _ = world
    with hostd(network, service.pids, *flags) as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode not in (0, None)
    assert said.count("\n") == 1 and re.search(what, said), said


def test_a_network_that_is_not_up_is_one_line(world: Any) -> None:
    class Nowhere:
        name = "never-made"

    _, service, _ = world
    with hostd(Nowhere, service.pids) as process:
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode and said.count("\n") == 1 and "wave net up never-made" in said


def test_a_second_hostd_for_the_same_network_is_refused(world: Any) -> None:
    network, service, _ = world
    with hostd(network, service.pids):
        serving(network.name)
        command = [sys.executable, "-P", "-c", "from waveos.cli import main; main()", "hostd", "--enclave", f"{network.name}-2", "--subsystem", "net"]
        (folder := Path(f"/tmp/{network.name}.toml")).write_text(f'[settings]\nnetwork = "{network.name}"\n')
        try:
            command += ["--config", str(folder), "--pids", str(service.pids[0]), "--policy", "rss"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        finally:
            folder.unlink()
        assert done.returncode and "belongs to the enclave" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_worker_that_ends_gets_no_more_requests(world: Any) -> None:  # the last: the others want all workers
    network, service, client = world
    with hostd(network, service.pids):
        serving(network.name)
        wait_for(lambda: len({*send(client).plan["worker"].tolist()}) == WORKERS)
        os.kill(service.pids[0], signal.SIGKILL)
        wait_for(lambda: (status(network.name) or {}).get("counters", {}).get("workers_gone") == 1)

        def only_the_others() -> bool:
            answered = send(client)
            return answered.unanswered == 0 and set(answered.plan["worker"].tolist()) == {1, 2}

        wait_for(only_the_others)
