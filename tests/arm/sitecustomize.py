"""For the emulated Arm of `make test-arm`: QEMU invents what a process reads of itself in /proc/PID/stat, with a start time that no other process sees.

By another name of the same file the kernel answers.
"""

import os

_open = os.open


def _by_another_name(path, *arguments, **options):
    if isinstance(path, str) and path.startswith("/proc/") and path.endswith("/stat"):
        path = "/proc/./" + path.removeprefix("/proc/")
    return _open(path, *arguments, **options)


os.open = _by_another_name
