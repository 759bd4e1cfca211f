"""BPF's ring buffers: every record arrives, once and in order, or its sender knows that it did not."""

from __future__ import annotations

import ctypes
import os
import select
import struct

import pytest

from waveos.host.bpf import BpfError, RingBuffer, UserRingBuffer
from waveos.host.bpf import rings as rings_module


class Request(ctypes.Structure):
    _fields_ = [("number", ctypes.c_uint32), ("times", ctypes.c_uint32), ("answer", ctypes.c_int64)]


def numbers(ring):
    return [struct.unpack("=Q", record)[0] for record in ring.poll()]


def test_records_come_in_order_and_once_over_many_laps(bpf):
    ring, say = RingBuffer(bpf.map("up")), bpf.program("say")
    assert numbers(ring) == []
    for lap in range(40):
        assert say.run(Request(lap * 100, 100)) == 100
        assert numbers(ring) == list(range(lap * 100, lap * 100 + 100))
    assert numbers(ring) == []


def test_a_full_ring_loses_nothing_that_was_taken_in(bpf):
    ring = RingBuffer(bpf.map("up"))
    said = bpf.program("say").run(Request(0, 1_000))
    assert 0 < said < 1_000
    assert numbers(ring) == list(range(said))


def test_a_poll_takes_a_bounded_number_and_the_next_goes_on(bpf, monkeypatch):
    monkeypatch.setattr(rings_module, "ENOUGH", 8)
    ring = RingBuffer(bpf.map("up"))
    bpf.program("say").run(Request(0, 20))
    assert [numbers(ring) for _ in range(4)] == [list(range(8)), list(range(8, 16)), list(range(16, 20)), []]


def test_its_descriptor_is_readable_while_there_is_a_record(bpf):
    ring = RingBuffer(bpf.map("up"))
    poll = select.epoll()
    poll.register(ring.fd, select.EPOLLIN)
    assert poll.poll(0) == []
    bpf.program("say").run(Request(0, 1))
    assert [fd for fd, _ in poll.poll(20)] == [ring.fd]
    ring.poll()
    assert poll.poll(0) == []
    poll.close()


def test_programs_take_what_was_sent(bpf):
    ring, request = UserRingBuffer(bpf.map("down")), Request()
    for number in range(100):
        assert ring.send(struct.pack("=Q", number))
    assert bpf.program("listen").run(request) == 100
    assert request.answer == sum(range(100))
    assert bpf.program("listen").run(request) == 0


def test_a_full_user_ring_says_so_and_takes_more_when_there_is_room(bpf):
    ring, request, sent = UserRingBuffer(bpf.map("down")), Request(), 0
    while ring.send(struct.pack("=Q", 1)):
        sent += 1
    assert sent == 4_096 // 16
    assert bpf.program("listen").run(request) == request.answer == sent
    assert ring.send(struct.pack("=Q", 1))
    with pytest.raises(ValueError, match="never fits"):
        ring.send(bytes(8_192))


def test_a_ring_outlives_its_object_and_says_when_it_is_closed(bpf):
    up, down = RingBuffer(bpf.map("up")), UserRingBuffer(bpf.map("down"))
    bpf.program("say").run(Request(5, 1))
    bpf.close()
    assert numbers(up) == [5]
    for ring in (up, down):
        ring.close()
        ring.close()
    with pytest.raises(ValueError, match="up is closed"):
        up.poll()
    with pytest.raises(ValueError, match="down is closed"):
        down.send(b"1234")


def test_a_map_that_is_no_ring_is_refused(bpf):
    for kind in (RingBuffer, UserRingBuffer):
        with pytest.raises(BpfError, match="map table"):
            kind(bpf.map("table"))
    assert os.path.exists(f"/proc/self/fd/{bpf.map('table').fd}")
