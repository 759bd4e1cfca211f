"""Objects: what is loaded can be used, what cannot be loaded is told in a line, and nothing is left behind."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from waveos.errors import MissingError
from waveos.host.bpf import BpfError, Object, library
from waveos.sched.records import MESSAGE, Message


class Request(ctypes.Structure):
    _fields_ = [("number", ctypes.c_uint32), ("times", ctypes.c_uint32), ("answer", ctypes.c_int64)]


def first_line(error) -> str:
    return str(error.value).splitlines()[0]


def test_a_section_is_the_memory_that_its_programs_write(bpf):
    shared = bpf.section(".bss.shared")
    calls, total = shared[:8].view("u8"), shared[8:16].view("i8")
    bpf.program("add").run(Request(4))
    bpf.program("add").run(Request(5))
    assert (calls[0], total[0]) == (2, 9)
    calls[0] = 40
    bpf.program("add").run(Request(1))
    assert calls[0] == 41


def test_a_record_that_a_program_writes_reads_as_the_contract_declares_it(bpf):
    request = Request(3)
    bpf.program("add").run(request)
    message = bpf.section(".bss.shared")[16 : 16 + MESSAGE.itemsize].view(MESSAGE)[0]
    assert message["type"] == Message.THREAD_DEAD
    assert message["ran_ns"] == request.answer == 103


def test_global_variables_are_set_before_the_load_by_name_and_size(objects):
    with Object(objects / "maps.bpf.o", rodata={"step": 3, "offset": -50, "start_at": np.uint64(1_000).tobytes()}) as bpf:
        request = Request(7)
        bpf.program("add").run(request)
        assert bpf.section(".bss.shared")[:8].view("u8")[0] == 3
        assert request.answer == 7 - 50 + 1_000


def test_constants_cannot_be_written_after_the_load(bpf):
    with pytest.raises(ValueError, match="read-only"):
        bpf.section(".rodata")[0] = 1


@pytest.mark.parametrize("value", [1 << 32, -(1 << 31) - 1, b"12345"])
def test_a_value_that_does_not_fit_its_variable_is_an_error(objects, value):
    with pytest.raises(ValueError, match=r"step of maps\.bpf\.o has 4 bytes"):
        Object(objects / "maps.bpf.o", rodata={"step": value})


def test_the_size_of_a_map_can_be_set_before_the_load(objects):
    with Object(objects / "maps.bpf.o", sizes={"table": 10}) as bpf:
        assert bpf.map("table").max_entries == 10
        assert bpf.map("table").mmap(np.uint32).shape == (10,)


def test_a_program_that_this_kernel_cannot_take_may_be_left_out(objects):
    with Object(objects / "nowhere.bpf.o", without=["nowhere"]) as bpf:
        assert bpf.program("anywhere").run() == 1
        with pytest.raises(BpfError, match="no program 'nowhere'"):
            bpf.program("nowhere")


def test_a_name_that_is_not_there_is_told_with_those_that_are(bpf, objects):
    for ask in (lambda: bpf.map("tabel"), lambda: Object(objects / "maps.bpf.o", sizes={"tabel": 1})):
        with pytest.raises(BpfError, match=r"no map 'tabel' \(did you mean 'table'\?\); it has: .*named.*table"):
            ask()
    with pytest.raises(BpfError, match="no program 'ad'"):
        bpf.program("ad")
    with pytest.raises(BpfError, match=r"no global variable 'stop' .*; it has: .*offset"):
        Object(objects / "maps.bpf.o", rodata={"stop": 1})
    with pytest.raises(BpfError, match="no program 'x'"):
        Object(objects / "maps.bpf.o", without=["x"])
    with pytest.raises(BpfError, match=r"table of maps\.bpf\.o is no struct_ops"):
        bpf.struct_ops("table")


def test_closing_twice_does_no_harm_and_what_is_closed_says_so(bpf):
    program, table, link, shared = bpf.program("nothing"), bpf.map("table"), bpf.attach("on_wakeup")[0], bpf.section(".bss.shared")
    bpf.close()
    bpf.close()
    assert bpf.closed
    assert not link.attached
    for ask in (program.run, lambda: table.fd, lambda: table.get(0), lambda: bpf.program("nothing"), lambda: program.fd, program.attach):
        with pytest.raises(ValueError, match=r"maps\.bpf\.o is closed"):
            ask()
    shared[:] = 0  # the memory outlives the object


def test_what_nothing_refers_to_is_unloaded(objects):
    bpf = Object(objects / "maps.bpf.o")
    found = bpf.program("nothing").fd
    assert os.path.exists(f"/proc/self/fd/{found}")
    del bpf
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/self/fd/{found}"):
        gc.collect()
        assert time.monotonic() < deadline


# ── what the kernel or the machine refuses ──


def test_what_the_verifier_refuses_is_told_with_its_words_and_the_log(objects):
    with pytest.raises(BpfError) as error:
        Object(objects / "refused.bpf.o")
    assert first_line(error) == "cannot load refused.bpf.o: the kernel's verifier refuses program 'wild': R1 invalid mem access 'scalar'"
    assert "r1 = *(u64 *)(r1 +0)" in str(error.value)
    assert "-- BEGIN PROG LOAD LOG --" in error.value.log


def test_a_kernel_without_that_struct_ops_or_function_is_told_which(objects):
    with pytest.raises(BpfError) as error:
        Object(objects / "lacking.bpf.o")
    assert first_line(error).startswith("cannot load lacking.bpf.o: this kernel has no struct_ops wave_no_such_ops; ")
    with pytest.raises(BpfError) as error:
        Object(objects / "nowhere.bpf.o")
    assert "this kernel has no 'wave_no_such_function' to attach to; leave that program out" in first_line(error)


def test_a_kernel_without_sched_ext_is_told_what_it_takes(objects):
    path = objects.parents[1] / "host/sched/sched_ext.bpf.o"
    if not path.exists() or os.path.exists("/sys/kernel/sched_ext"):
        pytest.skip("this kernel has sched_ext, or the object is not compiled")
    with pytest.raises(BpfError) as error:
        Object(path)
    assert first_line(error) == (
        "cannot load sched_ext.bpf.o: this kernel has no sched_ext; it takes Linux 6.12 or newer, built with CONFIG_SCHED_CLASS_EXT"
    )


def test_without_the_right_to_load_programs_it_says_who_has_it(objects):
    code = f"from waveos.host.bpf import Object\nObject({str(objects / 'maps.bpf.o')!r})"
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not installed")
    done = subprocess.run(
        ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False
    )
    assert "BpfError: cannot load maps.bpf.o: not allowed; be root, or have CAP_BPF" in done.stderr


def test_a_file_that_is_not_there_or_no_object_is_told(objects, tmp_path):
    with pytest.raises(BpfError, match="make bpf"):
        Object(tmp_path / "missing.bpf.o")
    (tmp_path / "text.bpf.o").write_text("text")
    with pytest.raises(BpfError, match=r"cannot open .*text\.bpf\.o: .*invalid"):
        Object(tmp_path / "text.bpf.o")


@pytest.fixture
def forgetful():
    """The library is looked for anew, and afterwards again."""
    library.libbpf.cache_clear()
    yield
    library.libbpf.cache_clear()


def test_a_machine_without_libbpf_or_with_an_old_one_is_told_how_to_get_it(monkeypatch, forgetful):
    def none(*_, **__):
        raise OSError("libbpf.so.1: cannot open shared object file")

    class Old:
        def __init__(self, *_, **__):
            self.libbpf_major_version = lambda: 1
            self.libbpf_minor_version = lambda: 1

    for answer, said in ((none, "libbpf is missing"), (Old, "libbpf 1.1 is too old")):
        monkeypatch.setattr(ctypes, "CDLL", answer)
        with pytest.raises(MissingError, match=f"{said}.*install libbpf1 >= 1.4"):
            library.libbpf()


def test_a_kernel_without_btf_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "BTF", tmp_path / "none")
    assert "this kernel has no BTF" in str(library.refused("load x.bpf.o", -3, ""))


# ── every way out ──

HOLDER = """
import signal, sys
from waveos.host.bpf import Object
bpf = Object(sys.argv[1])
link = bpf.struct_ops("wave_test")
print("ready", flush=True)
if sys.argv[2] == "raises":
    raise SystemExit(3)
if sys.argv[2] == "waits":
    signal.pause()
"""


def registered() -> bool:
    with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as names:
        return "wave_test" in names.read().split()


@pytest.mark.parametrize("way", ["returns", "raises", signal.SIGTERM, signal.SIGKILL])
def test_however_the_process_ends_nothing_stays_registered(congestion, way):
    what = way if isinstance(way, str) else "waits"
    process = subprocess.Popen([sys.executable, "-P", "-c", HOLDER, congestion, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        if what == "waits":
            assert registered()
            process.send_signal(way)
        assert process.communicate(timeout=60)[1] == ""
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 10
    while registered():
        assert time.monotonic() < deadline
        time.sleep(0.01)
