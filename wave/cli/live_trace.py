"""`wave trace --live 5s`: some seconds of an enclave of this machine, for Perfetto."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos.cli import INTERRUPTED
from waveos.cli.probe import parse_length
from waveos.cli.results import check_outputs
from waveos.cli.terminal import print_json, talk
from waveos.errors import LinkError


def trace_live(name: str | None, length: str, out: Path, as_json: bool) -> int | None:
    """Look on, then write. What was seen is kept when Ctrl-C, or the end of hostd, ends it sooner: the exit code says so."""
    seconds = parse_length(length, "--live")
    check_outputs(out)
    name = name or import_module("waveos.watch.source").only_enclave()
    if sys.stderr.isatty():
        talk(f"looking at {name} for {seconds:g} s ...")
    recording = import_module("waveos.watch.recording").record(name, seconds)
    watched = import_module("waveos.watch.events")
    events = watched.events_of(recording.messages, recording.decisions)
    about = {key: recording.about[key] for key in ("policy", "params", "mechanism", "cpus")}
    meta = {"enclave": name, **about, "timing": "measured", "lost": recording.lost, "threads": recording.names, "queues": watched.QUEUES}
    import_module("waveos.report.perfetto").write_trace(events, out, meta)
    told = {"messages": len(recording.messages), "decisions": len(recording.decisions), "events": len(events), "lost": recording.lost}
    if as_json:
        print_json({"path": str(out), "enclave": name, "seconds": seconds, **told, "ended": recording.over or None})
    else:
        print(out)
        talk(", ".join(f"{count:,} {what}" for what, count in told.items()) + "; open the file at https://ui.perfetto.dev")
    return end(recording, out)


def end(recording: Any, out: Path) -> int | None:
    """Say why it ended before its time, if it did; the exit code. Raises LinkError if hostd's end was why."""
    if recording.gone:
        raise LinkError(f"{recording.over}; what was seen before is in {out}")
    if recording.over:
        talk(f"it ended before its time: {recording.over}")
    return INTERRUPTED if recording.over == "interrupted" else None
