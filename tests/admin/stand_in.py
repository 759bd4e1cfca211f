"""A hostd that only answers, the administration beside it as a process of its own, and certificates."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

DEADLINE_S = 60.0
WAVE = [sys.executable, "-P", "-c", "import sys; from waveos.cli import run; sys.exit(run(sys.argv[1:]))"]
STATUS: dict[str, Any] = {
    "enclave": "web",
    "pid": 0,
    "subsystem": "sched",
    "mechanism": "sched_ext",
    "cpus": "2-5",
    "members": "cgroup /web, 40 threads",
    "policy": "fifo",
    "params": {"quantum_us": 500.5},
    "agent": {"pid": 7, "uid": 999, "for_s": 1.5},
    "attachments": 1,
    "agents_lost": 0,
    "agents_refused": 0,
    "counters": {"outcomes": {"committed": 2**53 + 1, "stale": 0}, "rings": -1, "share": 0.25, "live": True, "rounds": [1, 2, 3], "state": "ext"},
    "hostd": {"cpu_ns": 10**15},
}
REPORT = {"messages": 12, "event_ns": [[1_000, 3], [2_000, 1]], "policy": "fifo"}


def until(condition: Callable[[], Any], what: str = "") -> Any:
    end = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < end, what or "it never came true"
        time.sleep(0.01)
    return found


class StandIn:
    """A hostd's control socket: it answers as hostd does, and keeps what it was asked."""

    def __init__(self, run: Path, name: str) -> None:
        self.name, self.place = name, run / name
        self.place.mkdir(parents=True)
        self.asked: list[dict[str, Any]] = []
        self.answers: dict[str, dict[str, Any]] = {
            "status": {"ok": True, **STATUS, "enclave": name, "pid": os.getpid(), "report": REPORT},
            "set-policy": {"ok": True, "policy": "shinjuku", "params": {"quantum_us": 30.0}, "generation": 2, "was": "fifo"},
            "stop": {"ok": True},
        }
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(self.place / "control.sock"))
        self._door.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                line, _ = self._door.accept()
            except OSError:
                return
            with line, line.makefile("rw") as talk:
                for text in talk:
                    request = json.loads(text)
                    self.asked.append(request)
                    talk.write(json.dumps(self.answers[request["do"]]) + "\n")
                    talk.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it may be closed
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


class World:
    def __init__(self, run: Path) -> None:
        self.run, self.hostds, self.processes = run, dict[str, StandIn](), list[subprocess.Popen[str]]()

    def hostd(self, name: str) -> StandIn:
        self.hostds[name] = StandIn(self.run, name)
        return self.hostds[name]

    def serve(self, *arguments: str) -> subprocess.Popen[str]:
        """The administration, once it is ready."""
        process = subprocess.Popen([*WAVE, "admin", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    def refused(self, *arguments: str) -> str:
        """What the administration says when it does not come up."""
        done = subprocess.run([*WAVE, "admin", *arguments], capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 2 and done.stdout == ""
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return done.stderr

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.communicate(timeout=DEADLINE_S)
        for each in self.hostds.values():
            each.close()


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    run = tmp_path_factory.mktemp("w") / "run"
    run.mkdir()
    monkeypatch.setenv("WAVE_RUN", str(run))
    made = World(run)
    yield made
    made.close()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: ca.pem; server, reader, operator and expired with .pem and .key; stranger, signed by another CA."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder = tmp_path_factory.mktemp("tls")
    now = datetime.datetime.now(datetime.UTC)

    def make(name: str, issuer: Any = None, days: float = 30, ca: bool = False) -> Any:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = x509.CertificateBuilder(None, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=60)).not_valid_after(now + datetime.timedelta(days=days))
        builder = builder.issuer_name(issuer[0].subject if issuer else subject).add_extension(x509.BasicConstraints(ca, None), critical=True)
        if not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        cert = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        written = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{name}.key").write_bytes(written)
        (folder / f"{name}.key").chmod(0o600)
        return cert, key

    ca, other = make("ca", ca=True), make("other", ca=True)
    for name in ("server", "reader", "operator"):
        make(name, ca)
    make("expired", ca, days=-1)
    make("stranger", other)
    return folder
