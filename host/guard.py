"""A guard: a small process that puts back what a journal says when the process that keeps it is gone, however it went.

hostd needs none: it is a service, and whoever starts it anew has the old journal put back. An experiment that is killed is not started anew, and should leave
no swap and no limit until somebody thinks of `wave restore`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator

from waveos.host.restore import names, restore

FOR_S = 60.0
"""How long it tries: a cgroup cannot be removed before the last process in it has ended."""


@contextlib.contextmanager
def guarded(name: str) -> Iterator[int]:
    """Have the journal `name` of this process put back as soon as this process has ended without doing so; the guard's pid. It is in a session of its own,
    so that Ctrl-C does not reach it."""
    command = [sys.executable, "-P", "-m", "waveos.host.guard", name]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process.pid
    finally:
        assert process.stdin is not None
        process.stdin.close()
        if name not in names():  # all is put back; else the guard does it when we are gone
            process.terminate()
            process.wait()


def main(name: str) -> None:
    """Wait for the end of standard input, which is that of whoever holds its other end, and put back."""
    sys.stdin.read()
    end = time.monotonic() + FOR_S
    while name in names():
        done, failed = restore([name])
        for line in done:
            print(f"put back after a process that was killed: {line}", file=sys.stderr)
        if not failed:
            return
        if time.monotonic() >= end:
            print("\n".join(f"could not be put back, see `wave restore`: {line}" for line in failed), file=sys.stderr)
            return
        time.sleep(0.2)


if __name__ == "__main__":
    main(sys.argv[1])
