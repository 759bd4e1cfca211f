"""The caller's side of administration: gRPC to `wave admin`, at its UNIX sockets on this machine or over TCP with mutual TLS on another.

    with Admin() as admin:
        admin.enclaves()                        # [{"enclave": "web", "policy": ..., ...}, ...]
        admin.status("web")["counters"]         # as `wave status --json` prints it
        for time_ns, statuses in admin.counters("web", every_ms=500): ...
    with Admin(control=True) as admin:
        admin.set_policy("web", "shinjuku", {"quantum_us": 500})

$WAVE_ADMIN names another machine's (HOST:PORT); then $WAVE_ADMIN_TLS is a folder with `cert.pem` and `key.pem`, the caller's, and `ca.pem`, who signed
the server's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, LinkError, MissingError, WaveError

USER, GROUP = "wave-admin", "wave"
"""Whom the service runs as where that user exists, and who may read."""
ANSWER_S, CHANGE_S = 10.0, 130.0
START_S = 60.0
Status = dict[str, Any]


def run_folder() -> Path:
    """Where enclaves have their folders. WAVE_RUN names another place, for tests."""
    return Path(os.environ.get("WAVE_RUN", "/run/wave"))


def folder() -> Path:
    """Where the service has its sockets: beside the enclaves' folders, so that its user need not write there."""
    return run_folder().with_name(f"{run_folder().name}-admin")


def socket_path(control: bool) -> Path:
    """Of the socket to read, or of the one to order."""
    return folder() / ("control.sock" if control else "read.sock")


class Admin:
    """A connection; a context manager. Every call raises ConfigError for what was asked wrongly, LinkError if it is not answered."""

    def __init__(self, *, control: bool = False, start: bool = True) -> None:
        """`control`: to order, not only to read. `start`: root has the service started where none runs."""
        self._grpc = import_grpc()
        pb, stubs = import_module("waveos.proto.admin_pb2"), import_module("waveos.proto.admin_pb2_grpc")
        self._pb, self._figures = pb, import_module("waveos.figures")
        self._where = os.environ.get("WAVE_ADMIN", "")
        self._far = _split(self._where) if self._where else None
        if self._far:
            channel = self._grpc.secure_channel(self._where, self._credentials())
        else:
            path = socket_path(control)
            _knock(path, start)
            self._where = str(path)
            channel = self._grpc.insecure_channel(f"unix:{path}", options=[("grpc.enable_http_proxy", 0)])
        self._channel = channel
        self._read, self._control = stubs.ReadStub(channel), stubs.ControlStub(channel)

    def _credentials(self) -> Any:
        place = os.environ.get("WAVE_ADMIN_TLS")
        if not place:
            raise ConfigError(f"WAVE_ADMIN={self._where} is asked with mutual TLS: name the folder of cert.pem, key.pem and ca.pem in WAVE_ADMIN_TLS")
        cert, key, ca = (Path(place) / name for name in ("cert.pem", "key.pem", "ca.pem"))
        files = import_module("waveos.host.tls").Tls(cert, key, ca, called=("WAVE_ADMIN_TLS",) * 3)
        files.check()
        key, cert, ca = files.read()
        return self._grpc.ssl_channel_credentials(ca, key, cert)

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._grpc.RpcError as error:
            codes, code, line = self._grpc.StatusCode, error.code(), error.details() or ""
            if code in (codes.NOT_FOUND, codes.FAILED_PRECONDITION, codes.INVALID_ARGUMENT, codes.PERMISSION_DENIED, codes.RESOURCE_EXHAUSTED):
                raise ConfigError(line) from None
            if code is codes.DEADLINE_EXCEEDED:
                raise LinkError(f"the administration at {self._where} does not answer in time") from None
            if code is codes.UNAVAILABLE and "received from peer" not in error.debug_error_string():  # gRPC's own words, not the administration's
                line = self._why_not()
            raise LinkError(f"the administration at {self._where}: {line}") from None

    def _why_not(self) -> str:
        if not self._far:
            return "it has ended, or another has taken its place: ask again"
        try:
            socket.create_connection(self._far, ANSWER_S).close()
        except OSError as error:
            return f"nobody answers ({error.strerror or error}): mend WAVE_ADMIN, or start `wave admin --listen` there"
        return (
            "it lets nobody in with these certificates, or has just ended: has the CA of its --clients signed cert.pem, and the CA in ca.pem its certificate, "
            "which names that host?"
        )

    def status(self, enclave: str = "") -> Status:
        """Of one enclave; its name may be left out where there is one."""
        with self._explained():
            return self._plain(self._read.Status(self._pb.StatusRequest(enclave=enclave), timeout=ANSWER_S))

    def enclaves(self) -> list[Status]:
        """Of all; one that cannot be asked is {"enclave", "error"}."""
        with self._explained():
            return [self._plain(each) for each in self._read.Enclaves(self._pb.EnclavesRequest(), timeout=ANSWER_S).enclaves]

    def policies(self) -> list[dict[str, str]]:
        """Those that are installed there: {"name", "code", "distribution"}."""
        with self._explained():
            found = self._read.Policies(self._pb.PoliciesRequest(), timeout=ANSWER_S).policies
        return [{"name": each.name, "code": each.code, "distribution": each.distribution} for each in found]

    def counters(self, enclave: str = "", every_ms: int = 1_000) -> Iterator[tuple[int, list[Status]]]:
        """Statuses of one enclave or of all, again and again, each time with the time (ns since 1970) at which they were so."""
        with self._explained():
            for reply in self._read.Counters(self._pb.CountersRequest(enclave=enclave, every_ms=every_ms)):
                yield reply.time_ns, [self._plain(each) for each in reply.enclaves]

    def set_policy(self, enclave: str, policy: str, params: Mapping[str, float] | None = None) -> dict[str, Any]:
        """Let its agent run another one: {"policy", "params", "generation", "was"}."""
        with self._explained():
            request = self._pb.SetPolicyRequest(enclave=enclave, policy=policy, params=params or {})
            told = self._control.SetPolicy(request, timeout=CHANGE_S)
        return {"policy": told.policy, "params": dict(told.params), "generation": told.generation, "was": told.was}

    def drain(self, enclave: str) -> bool:
        """Hand it back to the kernel and let its hostd end; whether all is as it was before."""
        with self._explained():
            return bool(self._control.Drain(self._pb.DrainRequest(enclave=enclave), timeout=CHANGE_S).restored)

    def _plain(self, message: Any) -> Status:
        status: Status = self._figures.from_message(message)
        return status


def import_grpc() -> Any:
    """grpc, with what was generated for it. Raises MissingError."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said here, in words; gRPC reads it when it is imported
    try:
        import_module("waveos.proto.admin_pb2_grpc")
        return import_module("grpc")
    except (ImportError, RuntimeError) as error:
        why = f"{error}".splitlines()[0] if error.args else "?"
        raise MissingError(f"administration needs grpcio and protobuf ({why}): pip install 'waveos[host]'") from None


def _split(address: str) -> tuple[str, int]:
    """HOST:PORT. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(f"WAVE_ADMIN={address!r}: write HOST:PORT, as in host:7443")
    return host.strip("[]"), int(port)


def _knock(path: Path, start: bool) -> None:
    """Is somebody there, and may we? gRPC's own words for it are no words for people."""
    with socket.socket(socket.AF_UNIX) as line:
        try:
            line.connect(str(path))
            return
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        except PermissionError:
            who = "root and the user wave-admin order" if path.name == "control.sock" else f"members of the group {GROUP!r} read"
            raise ConfigError(f"{path} is not for this user: {who} there") from None
    if not start or os.geteuid() != 0:
        raise ConfigError(f"no administration runs on this machine ({path}): systemctl start wave-admin, or `wave admin` as root")
    _start()


def _start() -> None:
    """Have the service run beside us until the last enclave is gone, as systemd would have it run for good."""
    command = [sys.executable, "-P", "-m", "waveos.host.admin", "--while-enclaves"]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, cwd="/", text=True
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout as told, process.stderr as said:
        if told.readline():
            process.returncode = 0  # it is not ours to wait for any more
            return
        lines = said.read().splitlines()
    raise WaveError(f"the administration does not start: {lines[-1].removeprefix('wave: ') if lines else 'it says nothing'}")
