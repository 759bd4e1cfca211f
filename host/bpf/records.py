"""Writes wave_records.h: the contract's records and numbers for BPF programs, from their declarations in Python.

`make bpf` runs it; nothing imports it at run time. Every offset is checked again by the C compiler. Names in C: `struct wave_message`,
`MESSAGE_THREAD_NEW`, `DECISION_RUN`, `DECISION_PREEMPT` (a flag), `OUTCOME_STALE`, `RING_CREDIT_AT`, `WAVE_VERSION`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from waveos import record, ring
from waveos.outcome import Outcome
from waveos.sched import records as sched

RECORDS = {"message": sched.MESSAGE, "outcome": sched.OUTCOME, "decision": sched.DECISION}
ENUMS: dict[str, type[IntEnum]] = {"message": sched.Message, "decision": sched.Decision, "outcome": Outcome}
NUMBERS = {
    "WAVE_VERSION": record.VERSION,
    "WAVE_MAX_THREADS": record.MAX_THREADS,
    "WAVE_MAX_CPUS": record.MAX_CPUS,
    "WAVE_SUBSYSTEM_SCHED": sched.SUBSYSTEM,
    "DECISION_PREEMPT": sched.PREEMPT,
    "DECISION_KICKED": sched.KICKED,
    "RING_MAGIC": ring.MAGIC,
    "RING_HEADER_WORDS": ring.HEADER_WORDS,
    "RING_MAX_GENERATION": ring.MAX_GENERATION,
    **{f"RING_{name}": value for name, value in vars(ring).items() if name.endswith("_AT")},
}


def header() -> str:
    """The text of wave_records.h."""
    lines = ["/* Made by host/bpf/records.py (make bpf) from waveos.record, .ring, .outcome and .sched.records: change those. */", "#pragma once", ""]
    lines += ["#include <linux/types.h>", ""]
    lines += [f"#define {name} {value:#x}" if value > 0xFFFF else f"#define {name} {value}" for name, value in NUMBERS.items()]
    for name, members in ENUMS.items():
        lines += ["", *_enum(name, members)]
    for name, dtype in RECORDS.items():
        lines += ["", *_struct(f"struct wave_{name}", dtype)]
    return "\n".join(lines) + "\n"


def _enum(name: str, members: type[IntEnum]) -> Iterator[str]:
    yield f"enum wave_{name}_type {{"
    for member in members:
        meaning = getattr(member, "meaning", "")
        yield f"\t{name.upper()}_{member.name} = {member.value}," + (f" /* {meaning} */" if meaning else "")
    yield "};"


def _struct(name: str, dtype: np.dtype[np.void]) -> Iterator[str]:
    fields: Any = dtype.fields
    yield f"{name} {{"
    for field, (form, *_) in fields.items():
        yield f"\t__{'s' if form.kind == 'i' else 'u'}{8 * form.itemsize} {field};"
    yield "} __attribute__((aligned(8)));"
    yield f'_Static_assert(sizeof({name}) == {dtype.itemsize}, "a record is a cache line");'
    for field, (_, offset, *_) in fields.items():
        yield f'_Static_assert(__builtin_offsetof({name}, {field}) == {offset}, "as declared");'


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
