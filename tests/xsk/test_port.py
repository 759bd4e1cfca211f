"""An AF_XDP port on a wire of its own: what comes to it, what goes to the kernel, what is refused."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from wire import PORT, send_raw, udp_packet, wait_for

from waveos.errors import ConfigError
from waveos.host.net.topology import inside
from waveos.host.xsk import PACKET, Port
from waveos.host.xsk.rings import complete, fill, give_back, receive, send, wake

FOREVER_NS = 1 << 62


@contextlib.contextmanager
def served(net: Any, **options: Any) -> Iterator[Port]:
    """A port at the IPU's client side whose heart beats for ever."""
    with inside(net.ipu):
        port = Port.open("client", port=PORT, **options)
    with port:
        port.control["heartbeat_ns"] = FOREVER_NS  # never too old
        fill(port.xsk.record[0], port.frames.record[0])
        yield port


@contextlib.contextmanager
def listening(net: Any, port: int = PORT) -> Iterator[socket.socket]:
    """A plain UDP socket on the host."""
    with inside(net.host.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.bind((net.host.address, port))
        plain.settimeout(10)
        yield plain


def take(port: Port, n: int) -> list[bytes]:
    """The next n packets, which must come."""
    packets, out = np.zeros(64, PACKET), []
    while len(out) < n:
        wait_for(lambda: take_some(port, packets, out) > 0)
    return out


def take_some(port: Port, packets: Any, out: list[bytes]) -> int:
    got = receive(port.xsk.record[0], packets, len(packets))
    for at, length in packets[:got].tolist():
        out.append(port.umem.bytes[at : at + length].tobytes())
        give_back(port.frames.record[0], at)
    return got


def test_packets_of_the_service_come_as_they_were_sent_and_others_go_to_the_kernel(net: Any) -> None:
    with served(net) as port, listening(net, PORT + 1) as other:
        sent = [udp_packet(net, bytes([i]) * (i + 1)) for i in range(32)]
        send_raw(net, udp_packet(net, b"not yours", port=PORT + 1), *sent)
        assert [got[: len(packet)] for got, packet in zip(take(port, 32), sent, strict=True)] == sent
        assert other.recv(100) == b"not yours"
        assert port.redirect and port.redirect.counters()["redirected"] == 32


def test_without_a_heartbeat_packets_take_the_kernels_path_and_come_back_with_it(net: Any) -> None:
    with served(net) as port, listening(net) as plain:
        port.control["heartbeat_ns"] = time.monotonic_ns() - 1_000_000_000
        send_raw(net, udp_packet(net, b"nobody serves"))
        assert plain.recv(100) == b"nobody serves"
        port.control["heartbeat_ns"] = FOREVER_NS
        send_raw(net, udp_packet(net, b"served again"))
        assert take(port, 1)[0].endswith(b"served again")


def test_a_frame_sent_through_the_port_arrives_and_comes_back_free(net: Any) -> None:
    with served(net) as port, inside(net.client.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as plain:
        plain.bind((net.client.address, 0))
        plain.settimeout(10)
        plain.sendto(b"turn me round", (net.host.address, PORT))
        packets, free = np.zeros(4, PACKET), len(port.frames)
        wait_for(lambda: receive(port.xsk.record[0], packets, 4) == 1)
        from waveos.host.xsk.echo import turn

        turn(port.umem.address + int(packets[0]["at"]))
        assert send(port.xsk.record[0], packets, 0, 1) == 1
        wake(port.xsk.record[0])
        assert plain.recv(100) == b"turn me round"
        wait_for(lambda: complete(port.xsk.record[0], port.frames.record[0]) == 1)
        assert len(port.frames) == free + 1


def test_a_packet_larger_than_a_frame_is_dropped_and_counted_and_the_next_one_comes(net: Any) -> None:
    from pyroute2 import NetNS

    ends = [(net.client.namespace, "eth0"), (net.ipu, "client")]

    def set_mtu(mtu: int) -> None:
        for namespace, interface in ends:
            with NetNS(namespace) as ns:
                ns.link("set", index=ns.link_lookup(ifname=interface)[0], mtu=mtu)

    set_mtu(3_000)
    try:
        with served(net) as port:
            send_raw(net, udp_packet(net, b"x" * 2_500), udp_packet(net, b"small"))
            assert take(port, 1)[0].endswith(b"small")
            assert port.xsk.statistics()["rx_dropped"] >= 1
    finally:
        set_mtu(1_500)


def test_a_flood_on_another_port_goes_past_the_socket(net: Any) -> None:
    with served(net) as port, listening(net, PORT + 1) as other:
        send_raw(net, *[udp_packet(net, b"flood", port=PORT + 1)] * 2_000, udp_packet(net, b"mine"))
        assert take(port, 1)[0].endswith(b"mine")
        assert port.redirect and port.redirect.counters()["passed"] >= 2_000
        assert other.recv(100) == b"flood", "its owner has it"
        assert port.redirect.counters()["redirected"] == 1


def test_fragments_go_to_the_kernel_which_puts_them_together(net: Any) -> None:
    with served(net) as port, listening(net) as plain:
        with inside(net.client.namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"x" * 4_000, (net.host.address, PORT))
        assert len(plain.recv(10_000)) == 4_000
        assert port.redirect and port.redirect.counters()["fragments"] >= 3
        assert port.redirect.counters()["redirected"] == 0


def test_truncated_and_contradictory_packets_are_dropped_and_counted(net: Any) -> None:
    with served(net) as port, listening(net) as plain:
        bad = [
            udp_packet(net, b"y" * 200, cut=150),  # shorter than it says
            udp_packet(net, b"y" * 100, udp_length=4_000),  # UDP longer than IP
            udp_packet(net, b"y" * 100, udp_length=3),  # UDP shorter than its header
        ]
        send_raw(net, *bad, udp_packet(net, b"good"))
        assert take(port, 1)[0].endswith(b"good")
        assert port.redirect and port.redirect.counters()["malformed"] == len(bad)
        plain.setblocking(False)
        with pytest.raises(BlockingIOError):
            plain.recv(1)


def test_packets_cut_within_their_headers_are_left_to_the_kernel(net: Any) -> None:
    with served(net) as port:
        whole = udp_packet(net, b"z" * 20)
        send_raw(net, *(whole[:length] for length in (14, 20, 33, 34, 41)), udp_packet(net, b"good"))
        assert take(port, 1)[0].endswith(b"good")


def test_without_free_frames_packets_are_dropped_and_counted_and_nothing_else_happens(net: Any) -> None:
    with inside(net.ipu):
        port = Port.open("client", port=PORT, ring_size=64)
    with port:
        port.control["heartbeat_ns"] = FOREVER_NS
        send_raw(net, *[udp_packet(net, b"nowhere to go")] * 10)
        wait_for(lambda: port.xsk.statistics()["fill_ring_empty"] >= 10)
        fill(port.xsk.record[0], port.frames.record[0])
        send_raw(net, udp_packet(net, b"now there is"))
        assert take(port, 1)[0].endswith(b"now there is")


def test_an_interface_that_goes_down_and_up_serves_again(net: Any) -> None:
    from pyroute2 import NetNS

    with served(net) as port, NetNS(net.ipu) as ns:
        index = ns.link_lookup(ifname="client")[0]
        ns.link("set", index=index, state="down")
        with contextlib.suppress(OSError):
            send_raw(net, udp_packet(net, b"lost"))
        ns.link("set", index=index, state="up")

        def comes() -> bool:
            with contextlib.suppress(OSError):
                send_raw(net, udp_packet(net, b"back"))
            out: list[bytes] = []
            take_some(port, np.zeros(64, PACKET), out)
            return any(packet.endswith(b"back") for packet in out)

        wait_for(comes)


def test_a_driver_without_xdp_is_served_in_generic_mode_and_says_so(net: Any) -> None:
    with inside(net.ipu):
        with Port.open("bridge", port=PORT) as generic:
            assert generic.redirect and not generic.redirect.native
        with Port.open("client", port=PORT) as native:
            assert native.redirect and native.redirect.native


def test_what_cannot_be_opened_is_told_in_one_line_and_leaves_nothing(net: Any) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with inside(net.ipu):
        with pytest.raises(ConfigError, match=r"no interface 'nope'.*there are: .*client"):
            Port.open("nope", port=PORT)
        with pytest.raises(ConfigError, match="no queue 7"):
            Port.open("client", port=PORT, queue=7)
        with pytest.raises(ConfigError, match="power of two"):
            Port.open("client", port=PORT, ring_size=1_000)
        with Port.open("client", port=PORT), pytest.raises(ConfigError, match=r"taken|already"):
            Port.open("client", port=PORT)
    assert set(os.listdir("/proc/self/fd")) == before


def test_an_attached_port_serves_without_the_opener(net: Any) -> None:
    with served(net) as opened:
        copies = [os.dup(fd) for fd in opened.descriptors()]
        with Port.attach(opened.facts(), copies) as attached:
            send_raw(net, udp_packet(net, b"to whoever serves"))
            assert take(attached, 1)[0].endswith(b"to whoever serves")
            assert opened.heartbeat_at != attached.heartbeat_at
            attached.control["heartbeat_ns"] = 17
            assert int(opened.control["heartbeat_ns"][0]) == 17


def test_a_port_that_shares_frames_sends_what_the_other_received_without_a_copy(net: Any) -> None:
    with served(net) as port:
        with inside(net.ipu):
            other = Port.open("host", port=PORT, from_client=False, share=port)
        with other, listening(net) as plain:
            send_raw(net, udp_packet(net, b"straight through"))
            packets = np.zeros(4, PACKET)
            wait_for(lambda: receive(port.xsk.record[0], packets, 4) == 1)
            assert send(other.xsk.record[0], packets, 0, 1) == 1
            wake(other.xsk.record[0])
            assert plain.recv(100) == b"straight through"
