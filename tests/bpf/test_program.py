"""Programs: run by a call, attached and detached; struct_ops are registered and used by the kernel."""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
import threading
import time

import pytest

from waveos.host.bpf import BpfError, Object


class Request(ctypes.Structure):
    _fields_ = [("number", ctypes.c_uint32), ("times", ctypes.c_uint32), ("answer", ctypes.c_int64)]


def until(happens, what):
    deadline = time.monotonic() + 20
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def test_a_run_returns_what_the_program_does_and_leaves_what_it_wrote_in_the_context(bpf):
    add, request = bpf.program("add"), Request(4)
    assert bpf.program("nothing").run() == 7
    assert add.run(request) == -4
    assert request.answer == 104
    request.number = 6
    assert add.run(request) == -6
    assert request.answer == 110
    assert add.run(Request(1)) == -1
    assert add.run(struct.pack("=IIq", 2, 0, 0)) == -2
    assert bpf.section(".bss.shared")[8:16].view("i8")[0] == 13


def test_a_context_that_is_smaller_than_the_program_reads_is_the_kernels_error(bpf):
    for context in (None, bytes(8)):
        with pytest.raises(OSError, match="program add") as error:
            bpf.program("add").run(context)
        assert error.value.errno == errno.EINVAL


def wake(times):
    """That many threads wake this one."""
    for _ in range(times):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()


def test_an_attached_program_runs_until_its_link_is_destroyed(bpf):
    wakeups = bpf.section(".bss")[:8].view("u8")
    wake(5)
    assert wakeups[0] == 0
    (link,) = bpf.attach()
    assert (link.name, link.attached) == ("on_wakeup", True)
    assert link.fd > 2
    wake(5)
    until(lambda: wakeups[0] > 0, "no wake-up was counted")
    link.destroy()
    link.destroy()
    assert not link.attached
    with pytest.raises(ValueError, match="link on_wakeup is destroyed"):
        link.fd  # noqa: B018
    seen = wakeups[0]
    wake(5)
    assert wakeups[0] == seen


def test_of_several_programs_all_are_attached_or_none(bpf):
    wakeups = bpf.section(".bss")[:8].view("u8")
    with pytest.raises(BpfError, match="cannot attach program 'nothing'"):
        bpf.attach("on_wakeup", "nothing")
    seen = wakeups[0]
    wake(5)
    assert wakeups[0] == seen


def test_a_pinned_link_outlives_its_object_until_the_pin_is_removed(bpf, bpffs):
    wakeups = bpf.section(".bss")[:8].view("u8")
    bpf.program("on_wakeup").attach().pin(bpffs / "link")
    bpf.close()
    seen = wakeups[0]
    wake(5)
    until(lambda: wakeups[0] > seen, "the pinned program does not run")
    (bpffs / "link").unlink()

    def rests():
        seen = wakeups[0]
        wake(5)
        return wakeups[0] == seen

    until(rests, "the program still runs")


# ── struct_ops ──


def use(name, payload=200_000):
    """Send that many bytes over a TCP connection of loopback with that congestion control; what the other side got."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
        peer, _ = server.accept()
        with peer:
            sender = threading.Thread(target=lambda: (client.sendall(bytes(payload)), client.shutdown(socket.SHUT_WR)))
            sender.start()
            got = 0
            while part := peer.recv(65_536):
                got += len(part)
            sender.join()
    return got


def test_the_kernel_calls_registered_struct_ops_and_forgets_destroyed_ones(congestion):
    with Object(congestion) as bpf:
        connections, acks = (bpf.section(".bss")[at : at + 8].view("u8") for at in (0, 8))
        link = bpf.struct_ops("wave_test")
        assert use(b"wave_test") == 200_000
        assert (connections[0], acks[0] > 0) == (1, True)
        link.destroy()
        with pytest.raises(OSError, match="No such file") as error:
            use(b"wave_test")
        assert error.value.errno == errno.ENOENT
        assert bpf.struct_ops("wave_test").attached
        assert use(b"wave_test", 1_000) == 1_000
    with pytest.raises(OSError, match="No such file"):
        use(b"wave_test")


def test_struct_ops_of_a_name_that_is_taken_are_refused(congestion):
    with Object(congestion) as bpf, Object(congestion) as other:
        bpf.struct_ops("wave_test")
        with pytest.raises(BpfError, match=r"cannot register wave_test of congestion\.bpf\.o: the kernel has one already"):
            other.struct_ops("wave_test")
