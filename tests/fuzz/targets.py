"""What reads bytes that others wrote: each decoder as a function of bytes that raises WaveError or nothing, with good inputs to begin from.

A decoder that raises anything else, or changes state on input that it refuses, fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from waveos import record, tape
from waveos.cli.results import read_results
from waveos.errors import WaveError
from waveos.ipu_emulator.inputs import read_arrivals, read_samples
from waveos.ipu_emulator.replay import demands_of
from waveos.ipu_emulator.serving.faults import read_fault_trace
from waveos.ipu_emulator.serving.workload import bundled_trace, read_azure, read_mooncake
from waveos.keys import _read as read_key
from waveos.link.frames import Kind, pack, read_json, unpack
from waveos.link.session import Broken, Session
from waveos.scenario import check_scenario, load_scenario, scenario_names
from waveos.sched.records import DECISION, MESSAGE

SUBSYSTEM = 1


class Target(NamedTuple):
    """A decoder and inputs that it takes."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


_FOLDER = Path("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())


def _file(suffix: str, read: Callable[[Path], Any]) -> Callable[[bytes], None]:
    """A decoder of files, as one of bytes."""

    def decode(data: bytes) -> None:
        path = _FOLDER / f"wave-fuzz-{os.getpid()}{suffix}"
        try:
            path.write_bytes(data)
            read(path)
        finally:
            path.unlink(missing_ok=True)

    return decode


# ── frames of the network link ───────────────────────────────────────────────────────────────────────────────────────


def _frame(data: bytes) -> None:
    frame = unpack(data)
    if frame is None:
        return
    read_json(frame.body)
    session = Session(7, SUBSYSTEM, 100, 100)
    before = session.frames_in, session.got, session.taken
    body: Any = None
    with contextlib.suppress(Broken):
        body = session.hear(frame)
    assert body is not None or (session.frames_in, session.got, session.taken) == before, "a frame that was refused changed the session"


def _frames() -> list[bytes]:
    peer = Session(7, SUBSYSTEM, 1 << 20, 1 << 20)
    hello = pack(Kind.HELLO, record.VERSION, SUBSYSTEM, 9, body=b'{"enclave": "x"}')
    return [*(peer.data(bytes(64 * n)) for n in (1, 2, 3)), peer.say(Kind.BEAT), hello]


# ── recordings, and what a replay makes of the records in them ───────────────────────────────────────────────────────


def _tape(path: Path) -> None:
    _, messages, _ = tape.read(path)
    demands_of(messages)


def _tapes() -> list[bytes]:
    path = _FOLDER / f"wave-fuzz-seed-{os.getpid()}"
    messages = np.zeros(6, MESSAGE)
    messages["type"], messages["time_ns"] = [2, 4, 2, 4, 34, 33], np.arange(6) * 1_000
    messages["ran_ns"], messages["cpu"] = 500, 1
    try:
        tape.write(path, {"policy": "fifo", "params": {}, "cpus": [1]}, messages, np.zeros(2, DECISION))
        return [path.read_bytes()]
    finally:
        path.unlink(missing_ok=True)


# ── scenarios, traces, results, keys ─────────────────────────────────────────────────────────────────────────────────


def _scenario(data: bytes) -> None:
    try:
        raw = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        return  # as load_scenario says in a line
    except RecursionError:
        return
    check_scenario(raw, source="fuzz", text=data.decode())


def _scenarios() -> list[bytes]:
    from waveos.scenario import find_scenario

    return [find_scenario(name).read_bytes() for name in scenario_names()]


def _setting(data: bytes) -> None:
    load_scenario("mm8", [data.decode(errors="replace")])


def _json_lines() -> list[bytes]:
    return [b"\n".join(bundled_trace().read_bytes().split(b"\n")[:5]) + b"\n"]


def _results() -> list[bytes]:
    return [json.dumps({"name": "x", "configs": [], "notes": [], "timing": "modelled"}).encode()]


def _npz() -> list[bytes]:
    kept = io.BytesIO()
    np.savez(kept, get=np.arange(1, 9))
    return [kept.getvalue()]


TARGETS: dict[str, Target] = {
    "frame": Target(_frame, _frames),
    "json": Target(lambda data: (read_json(data), None)[1], lambda: [b'{"cpus": [1, 2], "about": {"x": 1.5}}']),
    "tape": Target(_file(".tape", _tape), _tapes),
    "scenario": Target(_scenario, _scenarios),
    "setting": Target(_setting, lambda: [b"run.seed=7", b"workload.classes.request.share=1", b"policies.names=fifo,edf"]),
    "arrivals": Target(_file(".csv", lambda path: read_arrivals(path, ["GET"])), lambda: [b"time_ns,class,service_ns\n0,GET,10\n5,GET,7\n"]),
    "samples": Target(_file(".csv", lambda path: read_samples(str(path), Path())), lambda: [b"service_ns\n10\n20\n"]),
    "samples_npz": Target(_file(".npz", lambda path: read_samples(f"{path}:get", Path())), _npz),
    "mooncake": Target(_file(".jsonl", read_mooncake), _json_lines),
    "azure": Target(_file(".csv", read_azure), lambda: [b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"]),
    "faults": Target(_file(".txt", read_fault_trace), lambda: [b"0 8\n10 7\n"]),
    "results": Target(_file(".json", read_results), _results),
    "key": Target(_file(".toml", lambda path: read_key(path, "peer")), lambda: [b'public = "x"\n']),
}


def add_admin() -> None:
    """The requests of the administration over gRPC, where grpcio and the generated code are."""
    try:
        pb = import_module("waveos.proto.admin_pb2")
        refused = import_module("google.protobuf.message").DecodeError
    except ModuleNotFoundError:
        return

    def decode(data: bytes) -> None:
        for kind in (pb.StatusRequest, pb.CountersRequest, pb.SetPolicyRequest, pb.DrainRequest, pb.EnclaveStatus):
            with contextlib.suppress(refused):
                kind.FromString(data)

    TARGETS["admin"] = Target(decode, lambda: [pb.SetPolicyRequest(enclave="x", policy="fifo", params={"quantum_us": 3.0}).SerializeToString()])


add_admin()


def run_one(name: str, data: bytes) -> None:
    """One input through one decoder. Raises what a decoder must not."""
    with contextlib.suppress(WaveError):
        TARGETS[name].read(data)


def corpus(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Inputs that once made a decoder fail, by target: the files of FOLDER/TARGET/."""
    for path in sorted(folder.glob("*/*")):
        yield path.parent.name, path.read_bytes()
