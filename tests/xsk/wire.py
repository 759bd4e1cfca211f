"""Raw packets on a wire between two network namespaces, and whether there can be one here."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import waveos.host.xsk

SOURCE_PORT, PORT = 4_000, 5_000
PATIENCE_S = 10.0


def why_not() -> str | None:
    """Why there can be no AF_XDP here."""
    if os.geteuid():
        return "AF_XDP sockets and network namespaces want root"
    try:
        socket.socket(44, socket.SOCK_RAW).close()
    except OSError as error:
        return f"this kernel has no AF_XDP sockets ({error.strerror})"
    if not (Path(waveos.host.xsk.__path__[0]) / "redirect.bpf.o").exists():
        return "the XDP program is not compiled: make bpf, with clang"
    try:
        from waveos.host.bpf.library import libbpf

        libbpf()
        import pyroute2  # noqa: F401
    except Exception as error:
        return str(error)
    return None


def udp_packet(net: object, payload: bytes, *, port: int = PORT, fragment: int = 0x4000, udp_length: int | None = None, cut: int = 0) -> bytes:
    """An Ethernet frame from the client to the host; `cut` bytes are missing at its end."""
    from waveos.host.xsk.generator import checksum

    client, host = net.client, net.host  # type: ignore[attr-defined]
    addresses = socket.inet_aton(client.address) + socket.inet_aton(host.address)
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 28 + len(payload), 7, fragment, 64, 17, 0) + addresses
    ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
    udp = struct.pack(">HHHH", SOURCE_PORT, port, 8 + len(payload) if udp_length is None else udp_length, 0)
    frame = host.mac + client.mac + b"\x08\x00" + ip + udp + payload
    return frame[: len(frame) - cut]


def send_raw(net: object, *packets: bytes) -> None:
    """From the client's interface, as they are."""
    from waveos.host.net.topology import inside

    with inside(net.client.namespace), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:  # type: ignore[attr-defined]
        raw.bind((net.client.interface, 0))  # type: ignore[attr-defined]
        for packet in packets:
            raw.send(packet)


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)
