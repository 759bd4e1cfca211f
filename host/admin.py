"""The administration of a machine's enclaves: a gRPC server at two UNIX sockets, and over TCP with mutual TLS. `wave admin`, or wave-admin.service.

It is a process of its own, beside the hostds: grpc brings threads, tens of MiB and a large surface that untrusted bytes reach, and hostd is one real-time
thread with its memory locked and capabilities over the kernel. So this process holds no privilege (the user wave-admin, or root without
capabilities); it speaks to each hostd through the control socket in the enclave's folder, one JSON line each way, and to it a hostd answers when its loop
has time. However many ask here, hostd is asked once in FRESH_S.

Who may do what is decided by the door one comes in at: read.sock is open to the group `wave`, control.sock to its owner (and root); over TCP a client
certificate that the CA signed may read, and one whose name was given with --controller may order.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from waveos import log, notify
from waveos.admin import GROUP, USER, folder, import_grpc, run_folder, socket_path
from waveos.errors import ConfigError, LinkError, WaveError
from waveos.host import privilege
from waveos.host.restore import NAME
from waveos.host.tls import Tls
from waveos.names import nearest
from waveos.process import start_time

FRESH_S = 0.1
"""For so long what a hostd has said is passed on to others who ask."""
ANSWER_S, CHANGE_S, DRAIN_S = 5.0, 120.0, 60.0
LEAST_MS, USUAL_MS = 100, 1_000
STREAMS = 64
"""Streams of counters that are served at once."""
MESSAGE_BYTES = 1 << 16
"""Requests are small; a larger one is refused by gRPC itself."""
LOOK_S, GRACE_S = 1.0, 10.0
LINE_BYTES = 1 << 20


@dataclass(frozen=True)
class Orders:
    """What the service was told on its command line."""

    listen: str = ""  # HOST:PORT; empty: UNIX sockets only
    tls: Tls | None = None
    controllers: frozenset[str] = frozenset()
    while_enclaves: bool = False  # end when the last one is gone


class Refused(Exception):
    """What a caller is told instead of an answer: the name of gRPC's status code, and a line."""

    def __init__(self, code: str, line: str) -> None:
        super().__init__(line)
        self.code = code


# The hostds


def enclaves() -> list[str]:
    """Those that have a door, whether or not somebody is behind it."""
    with contextlib.suppress(OSError):
        return sorted(path.parent.name for path in run_folder().glob("*/control.sock"))
    return []


async def ask(name: str, request: dict[str, Any], timeout_s: float = ANSWER_S) -> dict[str, Any]:
    """Ask the hostd of that enclave. Raises Refused."""
    path = run_folder() / name / "control.sock"
    if not NAME.fullmatch(name) or not path.exists():
        raise Refused("NOT_FOUND", _none_runs(name))
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=LINE_BYTES)
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
        if not line.endswith(b"\n"):
            raise Refused("UNAVAILABLE", f"the hostd of {name!r} went away before it answered")
        told: dict[str, Any] = json.loads(line)
    except (FileNotFoundError, ConnectionRefusedError):
        raise Refused("NOT_FOUND", _none_runs(name)) from None
    except PermissionError:
        raise Refused("UNAVAILABLE", f"{path} is not for the administration's user: was hostd started before the user {USER} was made?") from None
    except TimeoutError:
        raise Refused("UNAVAILABLE", f"the hostd of {name!r} does not answer within {timeout_s:g} s") from None
    except (OSError, ValueError) as error:
        raise Refused("UNAVAILABLE", f"the hostd of {name!r}: {error}") from None
    if not told.pop("ok", False):
        raise Refused("FAILED_PRECONDITION", str(told.get("error")))
    return told


def _none_runs(name: str) -> str:
    known = [each for each in enclaves() if each != name]
    return f"no hostd runs for an enclave {name!r}{nearest(name, known)}; those that do: {', '.join(known) or 'none'}"


class Watched:
    """What the hostds said last, so that many who ask cost each of them one question."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    async def status(self, name: str) -> Any:
        """Of one, as a message. Raises Refused, also for what cannot be one, of whatever kind that is: it is one enclave's."""
        now_s = time.monotonic()
        asked_s, task = self._asked.get(name, (-1.0, None))
        if task is None or (task.done() and now_s - asked_s > FRESH_S):
            task = asyncio.create_task(ask(name, {"do": "status"}))
            self._asked[name] = now_s, task
        from waveos.figures import to_message

        try:
            return to_message(await asyncio.shield(task))
        except Refused:
            self._asked.pop(name, None)
            raise
        except Exception as error:
            raise Refused("INTERNAL", f"what the hostd of {name!r} tells cannot be passed on: {error}") from None

    async def all(self) -> list[Any]:
        """Of all; what went wrong with one stands in its place."""
        from waveos.proto import admin_pb2 as pb

        async def one(name: str) -> Any:
            try:
                return await self.status(name)
            except Refused as refused:  # one that has just ended, or left its socket when it was killed, is no enclave
                return None if refused.code == "NOT_FOUND" else pb.EnclaveStatus(enclave=name, error=str(refused))

        self._asked = {name: asked for name, asked in self._asked.items() if name in enclaves()}
        return [each for each in await asyncio.gather(*map(one, enclaves())) if each is not None]


# The services


def make_services(watched: Watched, may_control: Callable[[Any], str]) -> tuple[Any, Any]:
    """(Read, Control) for one door. may_control(context): empty, or why this caller may not."""
    grpc = import_grpc()
    from waveos.proto import admin_pb2 as pb
    from waveos.proto import admin_pb2_grpc as stubs

    async def refuse(context: Any, refused: Refused) -> None:
        await context.abort(grpc.StatusCode[refused.code], str(refused))

    async def chosen(name: str) -> str:
        if name:
            return name
        known = [each.enclave for each in await watched.all()]
        if len(known) != 1:
            line = f"name the enclave: {', '.join(known)}" if known else "no hostd runs on this machine: `wave hostd` starts one"
            raise Refused("NOT_FOUND" if not known else "INVALID_ARGUMENT", line)
        return known[0]

    class Read(stubs.ReadServicer):
        streams = 0

        async def Status(self, request: Any, context: Any) -> Any:
            try:
                return await watched.status(await chosen(request.enclave))
            except Refused as refused:
                await refuse(context, refused)

        async def Enclaves(self, request: Any, context: Any) -> Any:
            return pb.EnclavesReply(enclaves=await watched.all())

        async def Policies(self, request: Any, context: Any) -> Any:
            return pb.PoliciesReply(policies=[pb.Policy(**each) for each in policies()])

        async def Counters(self, request: Any, context: Any) -> AsyncIterator[Any]:
            every_ms = request.every_ms or USUAL_MS
            if every_ms < LEAST_MS:
                line = f"every_ms = {every_ms}: {LEAST_MS} or more; each look costs the enclave's CPU some time"
                await refuse(context, Refused("INVALID_ARGUMENT", line))
            if Read.streams >= STREAMS:
                await refuse(context, Refused("RESOURCE_EXHAUSTED", f"{STREAMS} streams of counters are served already: end one"))
            Read.streams += 1
            try:
                while True:
                    found = [await watched.status(request.enclave)] if request.enclave else await watched.all()
                    yield pb.CountersReply(time_ns=time.time_ns(), enclaves=found)
                    await asyncio.sleep(every_ms / 1_000)
            except Refused as refused:
                await refuse(context, refused)
            finally:
                Read.streams -= 1

    class Control(stubs.ControlServicer):
        async def SetPolicy(self, request: Any, context: Any) -> Any:
            if why := may_control(context):
                await refuse(context, Refused("PERMISSION_DENIED", f"set-policy: {why}"))
            try:
                params = dict(request.params)
                told = await ask(request.enclave, {"do": "set-policy", "policy": request.policy, "params": params}, CHANGE_S)
            except Refused as refused:
                await refuse(context, refused)
            _say(f"{told['policy']}, no longer {told['was']}, as {_who(context)} wants", request.enclave)
            return pb.SetPolicyReply(policy=told["policy"], params=told["params"], generation=told["generation"], was=told["was"] or "")

        async def Drain(self, request: Any, context: Any) -> Any:
            if why := may_control(context):
                await refuse(context, Refused("PERMISSION_DENIED", f"drain: {why}"))
            try:
                pid = int((await ask(request.enclave, {"do": "status"}))["pid"])
                start = start_time(pid)
                await ask(request.enclave, {"do": "stop"})
            except Refused as refused:
                await refuse(context, refused)
            restored = await _gone(run_folder() / request.enclave, pid, start)
            _say(f"drained, as {_who(context)} wants" + ("" if restored else "; not everything could be put back"), request.enclave)
            return pb.DrainReply(restored=restored)

    return Read(), Control()


async def _gone(place: Path, pid: int, start: int | None) -> bool:
    """Wait for its hostd to end, or to have put everything back, which is the last that it does: then its journal is gone."""
    end_s = time.monotonic() + DRAIN_S
    while (place / "journal").exists() and start is not None and start_time(pid) == start and time.monotonic() < end_s:
        await asyncio.sleep(0.02)
    return not (place / "journal").exists()


def policies() -> list[dict[str, str]]:
    """Those that are installed, by name. Nothing of them is loaded here."""
    found = sorted(entry_points(group="waveos.policies"), key=lambda entry: entry.name)
    return [
        {"name": entry.name, "code": entry.value, "distribution": f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""} for entry in found
    ]


def _who(context: Any) -> str:
    """The caller, for the log: the name in its certificate, or the socket."""
    names = context.auth_context().get("x509_common_name", [])
    return f"{names[0].decode()!r} ({context.peer()})" if names else "one at the control socket"


# The doors


class Service:
    """The servers and their sockets; `serve` runs until it is stopped."""

    def __init__(self, orders: Orders) -> None:
        """Raises ConfigError when it cannot be had."""
        self.orders = orders
        self._watched = Watched()
        self._lock = -1
        self._servers: list[Any] = []

    async def serve(self) -> None:
        grpc = import_grpc()
        for module in ("grpc_health.v1.health", "grpc_reflection.v1alpha.reflection", "waveos.figures"):
            import_module(module)  # now: the user that this becomes may not be allowed to read where they lie
        self._take_place()
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            reading = f"this socket is to read; {socket_path(True)} is to order"
            await self._open(f"unix:{socket_path(False)}", lambda _context: reading)
            await self._open(f"unix:{socket_path(True)}", lambda _context: "")
            if self.orders.listen:
                assert self.orders.tls is not None
                await self._open(self.orders.listen, self._may_control, self.orders.tls.credentials(grpc))
            self._let_in()
            for server in self._servers:
                await server.start()
            if not self.orders.while_enclaves:
                _say(f"serving at {folder()}" + (f" and {self.orders.listen} (TLS)" if self.orders.listen else ""))
            notify.ready()
            print("ready", flush=True)
            if self.orders.while_enclaves:  # whoever had us started has gone by the time that there is something to say
                _become_silent()
            await self._until(stop)
            notify.stopping()
        finally:
            await asyncio.gather(*(server.stop(0.5) for server in self._servers))
            for path in (socket_path(False), socket_path(True)):
                path.unlink(missing_ok=True)

    def _take_place(self) -> None:
        """The folder, and the right to be the only one in it. A lock ends with its process, so what a power cut left is in nobody's way."""
        place = folder()
        try:
            place.mkdir(mode=0o755, parents=True, exist_ok=True)
            user = _service_user()
            if user is not None:
                os.chown(place, user.uid, user.gid)
            self._lock = os.open(place / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if user is not None:
                os.chown(place / "lock", user.uid, user.gid)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"an administration serves {place} already: one is enough for a machine") from None
        except OSError as error:
            raise ConfigError(
                f"{error.filename or place} cannot be used ({error.strerror}): start wave-admin.service, or run this as root"
            ) from error
        _give_up_privilege(user)
        os.umask(0o177)

    async def _open(self, address: str, may_control: Callable[[Any], str], credentials: Any = None) -> None:
        grpc = import_grpc()
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        from waveos.proto import admin_pb2 as pb
        from waveos.proto import admin_pb2_grpc as stubs

        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES), ("grpc.max_concurrent_streams", 128)]
        server = grpc.aio.server(options=options)
        read, control = make_services(self._watched, may_control)
        stubs.add_ReadServicer_to_server(read, server)
        stubs.add_ControlServicer_to_server(control, server)
        names = [service.full_name for service in pb.DESCRIPTOR.services_by_name.values()]
        well = health.aio.HealthServicer()
        for name in ("", *names):
            await well.set(name, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(well, server)
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            port = server.add_secure_port(address, credentials) if credentials is not None else server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port:
            raise ConfigError(f"cannot listen at {address.removeprefix('unix:')}: {_why_not(address)}")
        self._servers.append(server)

    def _let_in(self) -> None:
        """Both sockets were made for their owner alone; the group may come in at the first."""
        try:
            gid = privilege.group(GROUP)
            if os.stat(socket_path(False)).st_gid != gid:
                os.chown(socket_path(False), -1, gid)
            os.chmod(socket_path(False), 0o660)
        except ConfigError:
            if not self.orders.while_enclaves:
                _say(f"there is no group {GROUP!r}, so only root may read: groupadd --system {GROUP}, and start again")
        except OSError as error:
            raise ConfigError(f"{socket_path(False)} cannot be given to the group {GROUP!r}: {error.strerror}; is this user a member?") from error

    def _may_control(self, context: Any) -> str:
        known = context.auth_context()
        names = {name.decode() for kind in ("x509_common_name", "x509_subject_alternative_name") for name in known.get(kind, [])}
        if names & self.orders.controllers:
            return ""
        return f"the certificate of {', '.join(sorted(names)) or 'nobody'} may read; who may order is said with --controller"

    async def _until(self, stop: asyncio.Event) -> None:
        """Stopped, or nothing is left to serve; meanwhile the watchdog is told that the loop goes round."""
        last_s = time.monotonic()
        while not stop.is_set():
            notify.alive()
            if not self.orders.while_enclaves or _somebody(time.monotonic() - last_s > GRACE_S / 2):
                last_s = time.monotonic()
            elif time.monotonic() - last_s > GRACE_S:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), LOOK_S)


def _somebody(knock: bool) -> bool:
    """Whether an enclave is there. With `knock` only one that answers counts: who was killed has left a socket. Without, the answer may wait: False."""
    import socket

    for name in enclaves() if knock else ():
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as line:
            line.settimeout(LOOK_S)
            with contextlib.suppress(TimeoutError, PermissionError):
                line.connect(str(run_folder() / name / "control.sock"))
            return True
    return False


def _service_user() -> privilege.Account | None:
    """Whom root becomes for this, where the machine has such a user."""
    if os.geteuid() != 0:
        return None
    try:
        return privilege.account(USER)
    except ConfigError:
        return None


def _give_up_privilege(user: privilege.Account | None) -> None:
    """For good. Root without that user stays root by name, with nothing but the right to give a socket to a group."""
    if user is not None:
        with contextlib.suppress(ConfigError):
            os.setgroups([privilege.group(GROUP)])
        os.setgid(user.gid)
        os.setuid(user.uid)
    elif os.geteuid() == 0:
        privilege.keep_only(("CAP_CHOWN",))


def _why_not(address: str) -> str:
    """In plain words, by trying it the plain way: gRPC tells a code and the place in its source."""
    import socket

    if address.startswith("unix:"):
        return f"is {Path(address.removeprefix('unix:')).parent} there, and may this user write in it?"
    host, _, port = address.rpartition(":")
    try:
        [found, *_] = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0], socket.SOCK_STREAM) as line:
            line.bind(found[4])
    except (OSError, ValueError, OverflowError) as error:
        return f"{getattr(error, 'strerror', None) or error}; write HOST:PORT with a port that is free"
    return "gRPC gives no reason"


def _become_silent() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def parse_listen(address: str) -> str:
    """HOST:PORT. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigError(f"--listen {address!r}: write HOST:PORT, as in 0.0.0.0:7443")
    return address


def serve(orders: Orders) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError, MissingError."""
    log.choose("auto")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said here, in words
    asyncio.run(Service(orders).serve())


def _say(line: str, enclave: str | None = None) -> None:
    log.say("admin", line, enclave=enclave)


def _main(arguments: Sequence[str]) -> int:
    """As `waveos.admin` starts it; people and systemd say `wave admin`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--while-enclaves", action="store_true")
    options = parser.parse_args(arguments)
    try:
        serve(Orders(while_enclaves=options.while_enclaves))
    except (WaveError, LinkError) as error:
        print(f"wave: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
