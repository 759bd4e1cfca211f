"""UDP echo by AF_XDP, by recvmmsg and by a plain Python socket: packets a second, round trips, and what each costs its core.

The generator (AF_XDP as well) sits on one core, the servers take turns on another. On veth whoever sends also does the receiver's part, on the sender's
core. So that each side pays for its own, for packets a second the kernel's receiving half of the server's interface is a thread (threaded NAPI) on the
server's core, and the generator counts and drops the answers in its XDP program, as packet generators do. Round trips are of one packet under way, without
either, and AF_XDP polls for them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.bench.net_peers import KINDS, Peer
from waveos.errors import ConfigError, WaveError
from waveos.host.net import topology

PORT = 5_000
WARM_NS = 50_000_000


class Generator:
    """The client's end: an AF_XDP port for each server, all on this process's core."""

    def __init__(self, network: topology.Network, payload: int) -> None:
        from waveos.host.xsk.generator import udp_packet

        self._network, self._udp_packet, self._payload = network, udp_packet, bytes(payload)

    def turn(self, port: int, seconds: float, window: int, *, sink: bool) -> tuple[float, float, npt.NDArray[np.int64]]:
        """(packets/s sent, packets/s answered, round trips in ns). `sink`: answers are counted where they arrive, and not received."""
        from waveos.host.xsk import PACKET, Port
        from waveos.host.xsk.generator import BATCH, TALLY, generate
        from waveos.host.xsk.program import CONTROL
        from waveos.primitives import clock_ns

        client, host = self._network.client, self._network.host
        with topology.inside(client.namespace), Port.open("eth0", port=port, from_client=False) as opened:
            opened.control["sink"] = sink
            sunk_at = opened.heartbeat_at + int(CONTROL.fields["sunk"][1]) if sink else 0  # type: ignore[index]
            packet = np.frombuffer(self._udp_packet((client.mac, client.address, 4_000), (host.mac, host.address, port), self._payload), np.uint8)
            packets, tally, rtt_ns = np.zeros(BATCH, PACKET), np.zeros(1, TALLY), np.zeros(1 << 20, np.int64)
            xsk, frames = opened.xsk.record[0], opened.frames.record[0]
            arguments = (xsk, frames, packets, packet, tally[0], rtt_ns, opened.heartbeat_at, sunk_at, 0, window)
            generate(*arguments, 0)  # compiles
            generate(*arguments, clock_ns() + WARM_NS)
            first, begin = tally.copy(), clock_ns()
            generate(*arguments, begin + int(seconds * 1e9))
            span_s = (clock_ns() - begin) / 1e9
            sent, back = ((int(tally[name][0]) - int(first[name][0])) / span_s for name in ("sent", "back"))
            return sent, back, rtt_ns[int(first["timed"][0]) : int(tally["timed"][0])].copy()


def compare_echoes(metrics: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """Fill in `xsk_pps` and the others; lines for the verdict."""
    if (42 + options["payload"]) % 8 or options["payload"] < 24:
        raise ConfigError(f"--payload {options['payload']}: 42 bytes of headers and it make a multiple of 8, from 30 on; for example 86")
    pps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    rtt_us: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cost_ns: dict[str, list[float]] = {kind: [] for kind in KINDS}
    flood: list[float] = []
    affinity = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(topology.network(f"bench-{os.getpid()}", direct=True))
        peers = stack.enter_context(_peers(network, options["payload"], max(affinity)))
        os.sched_setaffinity(0, {min(affinity)})
        stack.callback(os.sched_setaffinity, 0, affinity)
        generator = Generator(network, options["payload"])
        for _ in range(options["rounds"]):
            for peer in peers:
                peer.go()
                peer.poll(always=False)
                with _receiving_thread(network.host, max(affinity)) as thread:
                    before = peer.cpu_ns() + _cpu_ns(thread)
                    _, back, _ = generator.turn(peer.port, options["seconds"], options["window"], sink=True)
                    answered = back * (options["seconds"] + WARM_NS / 1e9)
                    pps[peer.kind].append(back)
                    cost_ns[peer.kind].append((peer.cpu_ns() + _cpu_ns(thread) - before) / max(1.0, answered))
                    if peer.kind == "xsk":  # without a window: as much as the generator can, answered or not
                        flood.append(generator.turn(peer.port, options["seconds"], 1 << 40, sink=True)[0])
                peer.poll(always=True)
                trips = generator.turn(peer.port, options["seconds"] / 2, 1, sink=False)[2]
                if len(trips):
                    rtt_us[peer.kind].append(float(np.median(trips)) / 1e3)
                peer.stop()
    for kind in KINDS:
        metrics[f"{kind}_pps"] = float(np.median(pps[kind]))
        metrics[f"{kind}_rtt_p50_us"] = float(np.median(rtt_us[kind])) if rtt_us[kind] else float("nan")
        metrics[f"{kind}_server_ns_per_packet"] = float(np.median(cost_ns[kind]))
    metrics["generator_pps"] = float(np.median(flood))
    against = {kind: float(np.median(np.array(pps["xsk"]) / np.array(pps[kind]))) for kind in ("mmsg", "socket")}
    metrics["xsk_over_mmsg"], metrics["xsk_over_socket"] = against["mmsg"], against["socket"]
    return [
        f"AF_XDP echoes {against['mmsg']:.1f}x recvmmsg and {against['socket']:.1f}x a Python socket, medians of {options['rounds']} interleaved rounds; "
        f"the generator alone does {metrics['generator_pps'] / metrics['xsk_pps']:.1f}x that"
    ]


@contextlib.contextmanager
def _receiving_thread(side: topology.Side, core: int) -> Iterator[int]:
    """What the interface receives is the work of a thread on that core, for the time of a `with`; its pid."""
    before = _receiving_threads(side.interface)
    _set_threaded(side, "1")
    try:
        made = _receiving_threads(side.interface) - before
        if len(made) != 1:
            raise WaveError(f"{side.interface} in {side.namespace}: its kernel has no threaded NAPI (wanted 1 thread, found {len(made)})")
        (thread,) = made
        os.sched_setaffinity(thread, {core})
        yield thread
    finally:
        _set_threaded(side, "0")


def _set_threaded(side: topology.Side, value: str) -> None:
    command = ["ip", "netns", "exec", side.namespace, "sh", "-c", f"echo {value} > /sys/class/net/{side.interface}/threaded"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WaveError(f"{side.interface} in {side.namespace}: threaded NAPI cannot be set: {done.stderr.strip()}")


def _receiving_threads(interface: str) -> set[int]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith(f"napi/{interface}-"):
                found.add(int(path.parent.name))
    return found


def _cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


@contextlib.contextmanager
def _peers(network: topology.Network, payload: int, core: int) -> Iterator[list[Peer]]:
    peers: list[Peer] = []
    try:
        for i, kind in enumerate(KINDS):
            peers.append(Peer(network, kind, PORT + i, core, payload))
        yield peers
    finally:
        for peer in peers:
            peer.close()
