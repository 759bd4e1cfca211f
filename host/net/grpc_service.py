"""A gRPC service, the Stubby of the open world: GET and RANGE by worker processes that share one port, each connection steered to one of them.

Messages are plain bytes: a request is the key's number (8 bytes, little-endian), a reply is the worker's number (1 byte) and what was read. Methods:
`/wave.Store/Get` and `/wave.Store/Range`. A connection is what can be steered (SO_REUSEPORT): all calls over it stay with its worker.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent import futures
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.errors import MissingError, WaveError
from waveos.host.net.reuseport import ReuseportTable
from waveos.host.net.topology import Network, inside
from waveos.process import end_with

START_S = 60.0
GET, RANGE = "/wave.Store/Get", "/wave.Store/Range"


class GrpcService:
    """The workers, started in the host's namespace; with a `table` their listening sockets are the table's. `database`: RocksDB behind them; else an echo."""

    def __init__(self, network: Network, *, port: int, workers: int, table: ReuseportTable | None = None, database: Path | None = None) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self.address = f"{network.host.address}:{port}"
        try:
            for number in range(workers):
                ours, theirs = socket.socketpair()
                with ours:
                    command = [sys.executable, "-P", "-m", "waveos.host.net.grpc_service", self.address, str(number), str(theirs.fileno())]
                    command += ["--database", str(database)] if database else []
                    with theirs, inside(network.host.namespace):
                        self._processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()]))
                    if not select.select([ours], [], [], START_S)[0]:
                        raise WaveError("a worker of the gRPC service did not come up")
                    said, fds, _, _ = socket.recv_fds(ours, 16, 1)
                    if said != b"ready" or len(fds) != 1:
                        raise WaveError("a worker of the gRPC service did not come up; what it said is above")
                    with socket.socket(fileno=fds[0]) as listening:
                        if table is not None:
                            table.join(listening, number)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        for process in self._processes:
            process.kill()
            process.wait()

    def __enter__(self) -> GrpcService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(address: str, number: int, line: socket.socket, work: Callable[[bool, int], bytes]) -> None:
    """One worker: tells that it is ready, with its listening socket, and serves."""
    grpc = _import_grpc()

    def method(is_range: bool) -> Any:
        def answer(request: bytes, _context: Any) -> bytes:
            return bytes([number]) + work(is_range, int.from_bytes(request[:8], "little"))

        return grpc.unary_unary_rpc_method_handler(answer)  # without a serializer: bytes

    methods = {GET.rpartition("/")[2]: method(False), RANGE.rpartition("/")[2]: method(True)}
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=2), options=[("grpc.so_reuseport", 1)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(GET[1:].partition("/")[0], methods),))
    if not server.add_insecure_port(address):
        raise WaveError(f"cannot listen at {address}")
    server.start()
    socket.send_fds(line, [b"ready"], [_listening(int(address.rpartition(":")[2]))])
    server.wait_for_termination()


def _listening(port: int) -> int:
    """The descriptor of this process's socket that listens on the port: grpc keeps it to itself."""
    for name in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # not a socket, or the listing's own descriptor
        with copy:
            internet = copy.family in (socket.AF_INET, socket.AF_INET6)
            if internet and copy.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and copy.getsockname()[1] == port:
                return int(name)
    raise WaveError(f"nothing here listens on port {port}")


def _import_grpc() -> Any:
    try:
        return import_module("grpc")
    except ImportError:
        raise MissingError("the gRPC service needs grpcio, which is not installed: pip install 'waveos[host]'") from None


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("number", type=int)
    parser.add_argument("line", type=int)
    parser.add_argument("--database", default="")
    options = parser.parse_args()
    end_with(os.getppid())
    line = socket.socket(fileno=options.line)
    if not options.database:
        serve(options.address, options.number, line, lambda is_range, key: key.to_bytes(8, "little") * (8 if is_range else 1))
        return
    from waveos.host import rocksdb

    with rocksdb.open_read_only(options.database) as database:

        def work(is_range: bool, key: int) -> bytes:
            if is_range:
                found = rocksdb.scan(database, rocksdb.key_for(key % (rocksdb.ENTRIES - rocksdb.RANGE_ENTRIES)), rocksdb.RANGE_ENTRIES)
            else:
                found = rocksdb.get(database, rocksdb.key_for(key % rocksdb.ENTRIES))
            return repr(found).encode()

        serve(options.address, options.number, line, work)


if __name__ == "__main__":
    _main()
