"""Where it comes from: hostd's control socket in each enclave's folder for root, the administration's socket to read for others and for other machines
($WAVE_ADMIN), and the socket at which an agentd tells of itself (`wave agentd --status PATH`).

Each gives the same documents. This is the one place that knows how to get them.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.errors import ConfigError, LinkError, WaveError

Status = dict[str, Any]
"""As `wave status --json` prints it; of one that cannot be asked only `enclave` and `error`."""
ANSWER_S = 5.0


def enclaves() -> list[str]:
    """The enclaves of this machine that have a control socket, whether or not somebody listens there."""
    run: Path = import_module("waveos.host.restore").RUN
    with contextlib.suppress(OSError):
        return sorted(path.parent.name for path in run.glob("*/control.sock"))
    return []


def only_enclave() -> str:
    """The one enclave of this machine. Raises ConfigError if there is none, or one has to be named."""
    known = enclaves()
    if len(known) != 1:
        raise ConfigError(f"name the enclave: {', '.join(known)}" if known else "no hostd runs on this machine: `wave hostd` starts one")
    return known[0]


def status(name: str, *, detail: bool = False) -> Status:
    """What one enclave's hostd says; `on_cpus` with it where `detail` is wanted. Raises ConfigError if none runs, LinkError if it does not answer."""
    told: Status = import_module("waveos.host.doors").ask(name, {"do": "status", **({"detail": True} if detail else {})}, ANSWER_S)
    if not told.pop("ok", False):
        raise ConfigError(str(told.get("error")))
    return told


def statuses(names: list[str] | None = None, *, detail: bool = False) -> list[Status]:
    """Of these enclaves, or of all. One that cannot be asked is told as {"enclave", "error"}; where nobody can be asked at all, the enclave is ""."""
    if _through_administration():
        return _administered(names)
    found = []
    for name in enclaves() if names is None else names:
        try:
            found.append(status(name, detail=detail))
        except WaveError as error:
            found.append({"enclave": name, "error": str(error)})
    return found


def _through_administration() -> bool:
    """Whether it is to be asked: for another machine, or by a user at whom hostd's own door does not open, where it runs."""
    if os.environ.get("WAVE_ADMIN"):
        return True
    return os.geteuid() != 0 and bool(import_module("waveos.admin").socket_path(False).exists())


def _administered(names: list[str] | None) -> list[Status]:
    """Likewise; what each CPU does it does not tell."""
    try:
        with import_module("waveos.admin").Admin(start=False) as admin:
            found: list[Status] = admin.enclaves()
    except WaveError as error:
        return [{"enclave": name, "error": str(error)} for name in names or [""]]
    known = {each["enclave"]: each for each in found}
    if names is None:
        return found
    there = ", ".join(known) or "none"
    return [known.get(name, {"enclave": name, "error": f"no hostd runs for an enclave {name!r}; those that do: {there}"}) for name in names]


def agent_status(path: str | os.PathLike[str]) -> Status:
    """What the agentd that listens there says of itself. Raises LinkError if it does not."""
    deadline = time.monotonic() + ANSWER_S
    heard = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as line:
        try:
            line.settimeout(ANSWER_S)
            line.connect(os.fspath(path))
            while data := line.recv(1 << 20):
                heard += data
                line.settimeout(max(0.01, deadline - time.monotonic()))
            told: Status = json.loads(heard)
        except (OSError, ValueError) as error:
            raise LinkError(f"no agentd tells of itself at {os.fspath(path)} ({getattr(error, 'strerror', None) or error or 'no answer'})") from None
    return told
