"""Services behind one port: gRPC steered per connection, UDP on a real RocksDB."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "xsk"))
from wire import why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
PORT = 5_000


@pytest.fixture(scope="module")
def net() -> Iterator[Any]:
    from waveos.host.net import topology

    with topology.network(f"test-serve-{os.getpid()}", direct=True) as made:
        yield made


CALL = """
import sys, grpc
for _ in range(3):
    with grpc.insecure_channel(sys.argv[1]) as channel:
        get, scan = channel.unary_unary("/wave.Store/Get"), channel.unary_unary("/wave.Store/Range")
        replies = [call((7).to_bytes(8, "little"), timeout=30) for call in (get, scan, get)]
        print(*(reply[0] for reply in replies), len(replies[1]))
"""


def test_grpc_connections_go_to_the_worker_that_the_table_names_and_stay_there(net: Any) -> None:
    pytest.importorskip("grpc")
    import subprocess

    from waveos.host.net.grpc_service import GrpcService
    from waveos.host.net.reuseport import ENTRIES, ReuseportTable
    from waveos.host.net.topology import inside

    table = ReuseportTable()
    with GrpcService(net, port=PORT, workers=2, table=table) as service:
        for worker in (1, 0):
            for entry in range(ENTRIES):
                table.set_entry(entry, worker)
            with inside(net.client.namespace):  # a process of its own: grpc and this one's forks do not mix
                done = subprocess.run([sys.executable, "-P", "-c", CALL, service.address], capture_output=True, text=True, check=False, timeout=120)
            assert done.stdout == f"{worker} {worker} {worker} 65\n" * 3, done.stderr
    table.close()


def test_a_udp_service_on_rocksdb_answers_get_and_range(net: Any) -> None:
    pytest.importorskip("rocksdict")
    from waveos.host import rocksdb
    from waveos.host.net.client import Client, draw_plan
    from waveos.host.net.service import UdpService

    with (
        rocksdb.database() as folder,
        UdpService(net, port=PORT + 1, workers=2, database=folder) as _,
        Client(net, PORT + 1) as client,
    ):
        answered = client.run(draw_plan(200, 0.5, 0.05, flows=32, slo_us=(1_000, 50_000), seed=1), patience_s=30)
        assert answered.unanswered == 0
        work = answered.plan["work_ns"]
        assert work[answered.plan["request_class"] == 1].min() > work[answered.plan["request_class"] == 0].min() > 0
