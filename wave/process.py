"""Which process, for certain: a pid may be given out again, a pid with its start time is one process for ever (until the next boot)."""

from __future__ import annotations

from pathlib import Path


def start_time(pid: int) -> int | None:
    """When the process or thread started, in clock ticks since boot (field 22 of /proc/PID/stat); None if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def command_of(pid: int) -> str:
    """The name that the process or thread shows, for messages; "?" if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "?"
