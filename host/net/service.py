"""A UDP RPC service: worker processes in the host's namespace, each with a socket on the service's port and one on a port of its own.

The service's port is shared by all workers (SO_REUSEPORT): that is the kernel's path, where its hash picks the worker. A worker's own port, the
service's + 1 + its number, is where the IPU sends what its policy steered there. Replies leave from the service's port either way.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import WaveError
from waveos.host.net.reuseport import ReuseportTable
from waveos.host.net.topology import Network, inside
from waveos.net.records import ANSWERED, REPLY, REQUEST, RPC, RPC_MAGIC, RPC_VERSION
from waveos.process import end_with

PR_SET_TIMERSLACK = 29
START_S = 60.0
PACKET_BYTES = 2_048
KIND, WORKER, STATUS, WORK = (int(RPC.fields[name][1]) for name in ("kind", "worker", "status", "work_ns"))  # type: ignore[index]
CLASS, ARGUMENT, MAGIC = (int(RPC.fields[name][1]) for name in ("request_class", "argument", "magic"))  # type: ignore[index]


class UdpService:
    """The workers, started. `times_ns` makes their work a timed wait, drawn from these service times by class; `database` makes it RocksDB's GET and RANGE."""

    def __init__(
        self,
        network: Network,
        *,
        port: int,
        workers: int,
        times_ns: list[npt.NDArray[np.int64]] | None = None,
        database: Path | None = None,
        nice: int = 0,
        table: ReuseportTable | None = None,
    ) -> None:
        """`table`: by which the kernel picks a worker on the shared port; `shared` has their sockets on it then, to be closed with a worker that ends."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self.shared: list[socket.socket] = []
        fds = []
        if times_ns is not None:
            fds = [os.memfd_create("waveos-times") for _ in times_ns]
            for fd, times in zip(fds, times_ns, strict=True):
                os.write(fd, np.ascontiguousarray(times, np.int64).tobytes())
        try:
            for number in range(workers):
                command = [sys.executable, "-P", "-m", "waveos.host.net.service", network.host.address, str(port), str(number), "--nice", str(nice)]
                command += ["--times", ",".join(map(str, fds))] if fds else ["--database", str(database)]
                with inside(network.host.namespace), _shared_socket(network.host.address, port) as shared:
                    command += ["--shared", str(shared.fileno())]
                    self._processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[*fds, shared.fileno()]))
                    if table is not None:
                        table.join(shared, number)
                        self.shared.append(shared.dup())
            for process in self._processes:
                assert process.stdout is not None
                if not select.select([process.stdout], [], [], START_S)[0] or process.stdout.readline() != b"ready\n":
                    raise WaveError("a worker of the UDP service did not come up; what it said is above")
        except BaseException:
            self.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    @property
    def pids(self) -> list[int]:
        """Of the workers, by number."""
        return [process.pid for process in self._processes]

    def close(self) -> None:
        """End the workers."""
        for shared in self.shared:
            shared.close()
        for process in self._processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()

    def __enter__(self) -> UdpService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _shared_socket(address: str, port: int) -> socket.socket:
    """One of the sockets that share the service's port."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    made.bind((address, port))
    return made


def serve(shared: socket.socket, number: int, work: Callable[[int, int], None]) -> None:
    """One worker: take a request from either port, do its work, reply from the service's port."""
    address, port = shared.getsockname()
    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    own.bind((address, port + 1 + number))
    poll = select.poll()
    poll.register(shared, select.POLLIN)
    poll.register(own, select.POLLIN)
    buffer = bytearray(PACKET_BYTES)
    view, clock, by_fd = memoryview(buffer), time.monotonic_ns, {shared.fileno(): shared, own.fileno(): own}
    print("ready", flush=True)
    magic = RPC_MAGIC.to_bytes(2, "little") + bytes([RPC_VERSION, REQUEST])
    while True:
        for fd, _ in poll.poll():
            length, sender = by_fd[fd].recvfrom_into(buffer)
            if length < RPC.itemsize or buffer[MAGIC : MAGIC + 4] != magic:
                continue
            begin = clock()
            work(buffer[CLASS], int.from_bytes(buffer[ARGUMENT : ARGUMENT + 4], "little"))
            buffer[WORK : WORK + 4] = min(clock() - begin, 0xFFFF_FFFF).to_bytes(4, "little")
            buffer[KIND], buffer[STATUS], buffer[WORKER] = REPLY, ANSWERED, number
            shared.sendto(view[:length], sender)


def _waits(fds: list[int], seed: int) -> Callable[[int, int], None]:
    """Work that is a wait, as long as a service time drawn by class."""
    random = np.random.default_rng(seed)
    drawn = []
    for fd in fds:
        os.lseek(fd, 0, os.SEEK_SET)
        times = np.frombuffer(os.pread(fd, os.fstat(fd).st_size, 0), np.int64)
        drawn.append((random.choice(times, 65_536) / 1e9).tolist())
    turn = [0] * len(drawn)
    sleep = time.sleep

    def work(request_class: int, _argument: int) -> None:
        k = min(request_class, len(drawn) - 1)
        turn[k] = (turn[k] + 1) & 65_535
        sleep(drawn[k][turn[k]])

    return work


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("number", type=int)
    parser.add_argument("--times", default="")
    parser.add_argument("--database", default="")
    parser.add_argument("--shared", type=int, default=-1, help="a descriptor: the socket on the shared port")
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    end_with(os.getppid())
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(options.nice)
    with contextlib.ExitStack() as stack:
        if options.times:
            work: Any = _waits([int(fd) for fd in options.times.split(",")], seed=options.number)
        else:
            from waveos.host import rocksdb

            database = stack.enter_context(rocksdb.open_read_only(options.database))

            def work(request_class: int, argument: int) -> None:
                if request_class == 0:
                    rocksdb.get(database, rocksdb.key_for(argument % rocksdb.ENTRIES))
                else:
                    rocksdb.scan(database, rocksdb.key_for(argument % (rocksdb.ENTRIES - rocksdb.RANGE_ENTRIES)), rocksdb.RANGE_ENTRIES)

        with socket.socket(fileno=options.shared) if options.shared >= 0 else _shared_socket(options.address, options.port) as shared:
            serve(shared, options.number, work)


if __name__ == "__main__":
    _main()
