"""The tape: all that an agent was told and all that it decided, record by record, so that a run can be decided again.

A file is one line of JSON (policy, parameters, CPUs, threads, decisions ahead), padded to HEAD_BYTES, then records of 64 bytes: messages with the
BATCH_ENDs among them, and after each of them the decisions made on it. A decision has the mark DECIDED, which no message has.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from waveos.errors import ConfigError
from waveos.record import RECORD_BYTES, VERSION
from waveos.sched.records import DECISION, MESSAGE

Records = npt.NDArray[np.void]

DECIDED = 1
HEAD_BYTES = 1_024


def begin(path: str | os.PathLike[str], facts: dict[str, Any]) -> None:
    """Make an empty tape with these facts. Raises ConfigError if it cannot be written."""
    line = json.dumps({"wave": "tape", "version": VERSION, **facts}).encode()
    if len(line) >= HEAD_BYTES:
        raise ConfigError(f"the facts of a tape take {len(line)} bytes; at most {HEAD_BYTES - 1}: shorten the policy's path")
    try:
        Path(path).write_bytes(line.ljust(HEAD_BYTES - 1) + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot record to {os.fspath(path)}: {error.strerror}; name another file") from error


def append(path: str | os.PathLike[str], records: Records) -> None:
    """Put records at its end. Raises ConfigError if the disk is full."""
    try:
        with open(path, "ab") as file:
            file.write(records.tobytes())
    except OSError as error:
        raise ConfigError(f"cannot record to {os.fspath(path)}: {error.strerror}; what was recorded before is there") from error


def write(path: str | os.PathLike[str], facts: dict[str, Any], messages: Records, decisions: Records) -> None:
    """A whole tape of what an onlooker saw: [n] MESSAGE, then [m] DECISION, since which was made on which it does not know. Raises ConfigError."""
    begin(path, facts)
    append(path, messages)
    marked = decisions.copy()
    marked["mark"] = DECIDED
    append(path, marked)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Records, Records]:
    """(facts, messages with their batch ends [n] MESSAGE, decisions [m] DECISION). A record that was cut off is left out. Raises ConfigError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the tape {os.fspath(path)}: {error.strerror}") from error
    try:
        facts: dict[str, Any] = json.loads(content[:HEAD_BYTES])
        if facts.pop("wave") != "tape":
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ConfigError(f"{os.fspath(path)} is no tape of Wave; `wave agentd --record FILE` makes one") from None
    if (version := facts.pop("version")) != VERSION:
        raise ConfigError(f"the tape {os.fspath(path)} is of version {version} of the contract, this Wave reads version {VERSION}; record it anew")
    whole = (len(content) - HEAD_BYTES) // RECORD_BYTES
    records = np.frombuffer(content, MESSAGE, count=whole, offset=HEAD_BYTES).copy()
    decided = records["mark"] == DECIDED
    decisions = records[decided].view(DECISION)
    decisions["mark"] = 0
    return facts, records[~decided], decisions
