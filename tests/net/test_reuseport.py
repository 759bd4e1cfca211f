"""Sockets that share a port, steered by a table: each datagram, and each connection as a whole."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "xsk"))
from wire import why_not

from waveos.net.records import DECISION, Decision
from waveos.outcome import Outcome

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
WORKERS, PORT = 3, 5_000


@pytest.fixture
def net() -> Iterator[Any]:
    from waveos.host.net import topology

    with topology.network(f"test-reuse-{os.getpid()}", direct=True) as made:
        yield made


def group(net: Any, kind: int) -> list[socket.socket]:
    from waveos.host.net.topology import inside

    made = []
    with inside(net.host.namespace):
        for _ in range(WORKERS):
            each = socket.socket(socket.AF_INET, kind)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind((net.host.address, PORT))
            if kind == socket.SOCK_STREAM:
                each.listen(64)
            made.append(each)
    return made


def decide(*entries: tuple[int, int], kind: int = Decision.SET_ENTRY) -> Any:
    made = np.zeros(len(entries), DECISION)
    made["type"] = kind
    made["index"], made["worker"] = zip(*entries, strict=True)
    return made


def test_datagrams_go_where_the_table_says_and_elsewhere_where_it_says_nothing(net: Any) -> None:
    from waveos.host.net.reuseport import ENTRIES, ReuseportTable
    from waveos.host.net.topology import inside

    sockets, table = group(net, socket.SOCK_DGRAM), ReuseportTable()
    try:
        for worker, each in enumerate(sockets):
            table.join(each, worker)
        for wanted in (2, 0, 1):
            outcomes = table.apply(decide(*[(i, wanted) for i in range(ENTRIES)]), 10)
            assert set(outcomes["outcome"].tolist()) == {Outcome.COMMITTED}
            for _ in range(20):
                with inside(net.client.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                    client.sendto(b"x", (net.host.address, PORT))
                ready, _, _ = select.select(sockets, [], [], 10)
                assert ready == [sockets[wanted]]
                ready[0].recv(10)
        assert table.counters() == {"steered": 60, "left": 0}
        refused = table.apply(decide((ENTRIES, 0), (3, 7)), 10)["outcome"].tolist()
        assert refused == [Outcome.INVALID, Outcome.NOT_IN_ENCLAVE]
        sockets[1].close()  # the table names it still: the kernel chooses
        with inside(net.client.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"x", (net.host.address, PORT))
        assert select.select([sockets[0], sockets[2]], [], [], 10)[0]
        assert table.counters()["left"] == 1
    finally:
        table.close()
        for each in sockets:
            each.close()


def test_a_connection_stays_with_its_worker_whatever_the_table_says_later(net: Any) -> None:
    from waveos.host.net.reuseport import ENTRIES, ReuseportTable
    from waveos.host.net.topology import inside

    sockets, table = group(net, socket.SOCK_STREAM), ReuseportTable()
    try:
        for worker, each in enumerate(sockets):
            table.join(each, worker)
        table.apply(decide(*[(i, 1) for i in range(ENTRIES)]), 10)
        with inside(net.client.namespace), socket.create_connection((net.host.address, PORT), timeout=10) as client:
            server, _ = sockets[1].accept()
            table.apply(decide(*[(i, 0) for i in range(ENTRIES)]), 20)
            with server:
                client.sendall(b"still here")
                assert server.recv(100) == b"still here"
        with inside(net.client.namespace), socket.create_connection((net.host.address, PORT), timeout=10):
            sockets[0].settimeout(10)
            sockets[0].accept()[0].close()
    finally:
        table.close()
        for each in sockets:
            each.close()


def test_a_worker_that_does_not_keep_up_loses_its_share_by_decisions_of_an_agent(net: Any) -> None:
    """Messages and decisions cross between two processes; the kernel steers."""
    from waveos.host.net.reuseport import KERNELS_CHOICE, ReuseportTable
    from waveos.host.net.service import UdpService
    from waveos.host.net.steering import TableSteering
    from waveos.host.net.topology import inside
    from waveos.net.records import RPC, RPC_MAGIC, RPC_VERSION

    request = np.zeros(1, RPC)
    request["magic"], request["version"] = RPC_MAGIC, RPC_VERSION
    url, end = f"shm://test-steer-{os.getpid()}", time.monotonic() + 60

    def send(flows: int) -> int:
        """So many requests, each of a flow of its own: how many are answered at once."""
        with inside(net.client.namespace):
            clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(flows)]
        for client in clients:
            client.sendto(request.tobytes(), (net.host.address, PORT))
        waiting, until = list(clients), time.monotonic() + 1.0
        while waiting and time.monotonic() < until:
            steering.turn()
            for client in select.select(waiting, [], [], 0.005)[0]:
                waiting.remove(client)
        for client in clients:
            client.close()
        return flows - len(waiting)

    table = ReuseportTable()
    times = [np.full(4, 50_000, np.int64)]
    with (
        UdpService(net, port=PORT, workers=2, times_ns=times, table=table) as service,
        TableSteering(url, table, dict(enumerate(service.shared))) as steering,
    ):
        command = [sys.executable, "-P", "-m", "waveos.agents.net.agent", url, "rebalance", "--param", "difference=4", "--param", "step=64"]
        agent = subprocess.Popen(command)
        try:
            os.kill(service.pids[0], signal.SIGSTOP)
            while send(64) < 64:
                assert time.monotonic() < end and agent.poll() is None, "requests still go to the worker that does nothing"
            assert steering.committed >= 16 and steering.refused == 0
            agent.kill()
            agent.wait()
            while not np.all(table._table == KERNELS_CHOICE):
                steering.turn()
                assert time.monotonic() < end, "the kernel chooses once the agent is gone"
        finally:
            agent.kill()
            agent.wait()
    table.close()


def test_a_socket_that_does_not_share_its_port_is_refused(net: Any) -> None:
    from waveos.errors import ConfigError
    from waveos.host.net.reuseport import ReuseportTable

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as alone:
        table = ReuseportTable()
        with pytest.raises(ConfigError, match="SO_REUSEPORT"):
            table.join(alone, 0)
        table.close()
