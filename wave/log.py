"""What daemons say of themselves, on stderr: a line for people, or, under systemd and with `--log json`, a JSON object for machines.

    log.choose("auto"); log.say("hostd", "its agent (pid 7) ended", level="warning", enclave="demo", status=1)
    hostd: demo: its agent (pid 7) ended
    {"daemon": "hostd", "enclave": "demo", "status": 1, "event": "its agent (pid 7) ended", "level": "warning", "timestamp": "2026-01-01T00:00:00Z"}

For cold paths alone. structlog is loaded by `choose`, before a daemon begins its work, and only for JSON: one that speaks to people does without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Literal

from waveos.errors import ConfigError, MissingError

MODES = ("auto", "human", "json")
Level = Literal["info", "warning", "error"]
_PRIORITIES = {"info": 6, "warning": 4, "error": 3}
"""syslog(3)'s, which the journal takes from the begin of a line (`<4>...`)."""

_json = False
_write: Callable[..., None] | None = None


def choose(mode: str = "auto") -> None:
    """How to speak from now on: "human", "json", or "auto": JSON where stderr is the journal. Raises ConfigError; MissingError for "json" without structlog."""
    global _json, _write
    if mode not in MODES:
        raise ConfigError(f"--log {mode}: there are {', '.join(MODES)}")
    _json, _write = False, None
    if mode == "json" or (mode == "auto" and to_journal()):
        try:
            _json, _write = True, _structured()
        except MissingError:
            _json = False  # in the journal a line for people is better than none
            if mode == "json":
                raise


def as_json() -> bool:
    """Whether lines are JSON."""
    return _json


def to_journal() -> bool:
    """Whether stderr leads to systemd's journal, as JOURNAL_STREAM says of its device and inode (systemd.exec(5))."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        about = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(about.st_dev), str(about.st_ino))


def say(daemon: str, line: str, level: Level = "info", **fields: Any) -> None:
    """One line. For people it is `daemon: enclave: line`; the other fields are for machines, and what matters of them is in the line."""
    if _write is not None:
        _write(level, line, daemon=daemon, **{key: value for key, value in fields.items() if value is not None})
        return
    enclave = f"{fields['enclave']}: " if fields.get("enclave") else ""
    print(f"{daemon}: {enclave}{line}", file=sys.stderr, flush=True)


def _structured() -> Callable[..., None]:
    try:
        import structlog
    except ImportError as error:
        raise MissingError(
            f"JSON logs need structlog ({error.name} is missing): pip install 'waveos[host]' or 'waveos[agent]', or --log human"
        ) from None
    render = structlog.processors.JSONRenderer(ensure_ascii=False, default=str)
    prefixed = to_journal()

    def line(logger: Any, method: str, event: Any) -> str:
        text = str(render(logger, method, event))
        return f"<{_PRIORITIES[event['level']]}>{text}" if prefixed else text

    processors: Any = [structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso", utc=True), line]
    logger = structlog.wrap_logger(structlog.PrintLogger(sys.stderr), processors=processors, wrapper_class=structlog.BoundLogger)
    return lambda level, text, **fields: getattr(logger, level)(text, **fields)
