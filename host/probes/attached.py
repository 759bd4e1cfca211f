"""The process that holds a probe: the system's Python, which has bcc, compiles the text, attaches it, and answers for its tables.

It is run as a program (`/usr/bin/python3 -I attached.py PID-OF-THE-PARENT`) and knows nothing of Wave: one JSON object a line on standard input, one on
standard output for each. The first is `{"text": the probe, "source": a folder of kernel headers or null}`; it is answered when the probe counts. Then
`{"do": "watch", "threads": [...]}`, `{"do": "reset", "tables": [...]}` and `{"do": "read", "tables": [...]}`.

Whatever ends this process (end of its input, a signal, its parent's death) detaches the probe: nothing is pinned, the kernel
closes what a process held. Where tracefs is not mounted it is mounted in a mount namespace of this process alone.
"""

import contextlib
import ctypes
import json
import os
import select
import sys
import time
from importlib import import_module

TRACEFS = ("/sys/kernel/debug/tracing", "/sys/kernel/tracing")
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
_PARENT_S = 1.0
"""How often it looks whether its parent lives; some other process may hold its input open."""


class Refused(Exception):
    """Why the probe cannot run: what is missing (bcc, tracefs, or it was not attached) and the reason."""


def main():
    asked = requests(parent=int(sys.argv[1]))
    try:
        first = next(asked)
        bpf = attach(first["text"], first["source"])
        answer({"at_ns": time.monotonic_ns()})
        for request in asked:
            answer(carry_out(bpf, request))
    except Refused as refused:
        answer({"refused": list(refused.args)})
    except StopIteration:
        pass


def requests(parent):
    """The objects on standard input, until it ends or the parent has gone."""
    held = b""
    while os.getppid() == parent:
        if not select.select([0], [], [], _PARENT_S)[0]:
            continue
        more = os.read(0, 65536)
        if not more:
            return
        *lines, held = (held + more).split(b"\n")
        yield from map(json.loads, lines)


def answer(value):
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps(value), flush=True)


def attach(text, source):
    if source:
        os.environ["BCC_KERNEL_SOURCE"] = source
    try:
        bcc = import_module("bcc")
    except (ImportError, OSError) as error:
        raise Refused("bcc", str(error)) from None
    see_tracefs()
    if os.path.isdir(os.path.join(tracefs(), "events/irq_vectors")):
        text = "#define IRQ_VECTORS\n" + text
    try:
        return bcc.BPF(text=text)
    except Exception as error:  # bcc raises plain Exception; clang's and the verifier's words are on stderr
        raise Refused("attach", str(error)) from None


def tracefs():
    return next((folder for folder in TRACEFS if os.path.isdir(folder + "/events")), None)


def see_tracefs():
    """Mount tracefs where nobody but this process sees it, if it is not there."""
    if tracefs():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"tracefs", TRACEFS[1].encode(), b"tracefs", 0, None)
    ):
        raise Refused("tracefs", os.strerror(ctypes.get_errno()))


def carry_out(bpf, request):
    do = request["do"]
    if do == "watch":
        watched = bpf["watched"]
        for thread in request["threads"]:
            watched[ctypes.c_uint(thread)] = ctypes.c_ubyte(1)
    elif do == "reset":
        for name in request["tables"]:
            bpf[name].clear()
        now = time.monotonic_ns()
        with contextlib.suppress(KeyError):
            bpf["began_at"][ctypes.c_int(0)] = ctypes.c_ulonglong(now)
        return {"at_ns": now}
    elif do == "read":
        now = time.monotonic_ns()
        return {"at_ns": now, "tables": {name: contents(bpf[name]) for name in request["tables"]}}
    return {"at_ns": time.monotonic_ns()}


def contents(table):
    """[[key, value], ...] of what is not zero; a per-CPU value is a list."""
    pairs = []
    for key in table:
        with contextlib.suppress(KeyError):  # gone since: the probe goes on while it is read
            pairs.append([plain(key), plain(table[key])])
    return [pair for pair in pairs if not empty(pair[1])]


def plain(value):
    if isinstance(value, ctypes.Structure):
        return {name: plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, ctypes.Array):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return getattr(value, "value", value)


def empty(value):
    if isinstance(value, (dict, list)):
        return all(map(empty, value.values() if isinstance(value, dict) else value))
    return not value


if __name__ == "__main__":
    main()
