"""The protocol in every order: spin tries all of the model's, and finds what is wrong where a precaution is left out."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from waveos.outcome import Outcome
from waveos.sched.records import Decision, Message

MODEL = Path(__file__).with_name("protocol.pml")
ROOT = Path(__file__).parents[2]
ENUMS = (Message, Decision, Outcome)
LEFT_OUT = {
    "THREAD_RUNNING": "the host ran a thread by itself: to the agent as an outcome",
    "THREAD_PREEMPTED": "as THREAD_RUNNABLE",
    "THREAD_YIELDED": "as THREAD_RUNNABLE",
    "THREAD_DEAD": "as THREAD_BLOCKED, for good",
    "CPU_NEW": "the model has a CPU for each task",
    "CPU_IDLE": "likewise",
    "CPU_TAKEN": "likewise",
    "CPU_BACK": "likewise",
    "TICK": "changes nothing",
    "TIMER_EXPIRED": "never leaves the agent",
    "TXN_FAILED": "never leaves the agent",
    "AFFINITY_CHANGED": "changes a number only",
    "PRIORITY_CHANGED": "changes a number only",
    "BATCH_END": "never leaves the agent",
    "YIELD_CPU": "a decision on a CPU's number as RUN is on a thread's",
    "KICK": "says nothing of a thread",
    "DEMOTE": "on a CPU's number as YIELD_CPU is; what the host then does by itself is a preemption and a start that it tells",
    "TARGET_GONE": "to the agent as CPU_UNAVAILABLE is: the decision was not applied",
    "TARGET_NOT_RUNNABLE": "likewise",
    "TARGET_ON_CPU": "likewise",
    "NOT_IN_ENCLAVE": "likewise",
    "SUPERSEDED": "likewise",
    "INVALID": "likewise",
    "CONGESTED": "likewise",
    "AGENT_LOST": "likewise",
}
"""Members of the enums that the model does without, and why."""
pytestmark = pytest.mark.skipif(not (shutil.which("spin") and shutil.which("gcc")), reason="no spin or gcc here: apt-get install spin gcc")


def numbers() -> dict[str, int]:
    """Every name that the model uses, with the enums' number."""
    text = re.sub(r"/\*.*?\*/", "", MODEL.read_text(), flags=re.DOTALL)
    words = set(re.findall(r"[A-Z_]{3,}", text))
    return {member.name: int(member) for enum in ENUMS for member in enum if member.name in words}


def check(folder: Path, *left_out: str, faults: int = 1, wakes: int = 2) -> str:
    """What spin's verifier says of the model, all of it looked at."""
    defines = [f"-D{name}={number}" for name, number in numbers().items()]
    build = ["spin", "-a", *defines, *(f"-D{each}" for each in left_out), f"-DFAULTS={faults}", f"-DWAKES={wakes}", str(MODEL)]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    subprocess.run(
        ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=2048", "-o", "pan", "pan.c"], cwd=folder, check=True, capture_output=True
    )
    return subprocess.run(["./pan", "-m1000000", "-w22"], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(("faults", "wakes"), [(1, 2), (3, 1)])
def test_no_task_is_lost_no_stale_decision_applied_and_nothing_stands_still(tmp_path, faults, wakes):
    said = check(tmp_path, faults=faults, wakes=wakes)
    assert "errors: 0" in said, said
    assert "max search depth too small" not in said, said
    states = int(re.search(r"(\d+) states, stored", said)[1])
    assert states > 100_000, f"{states}: too small a model to say anything"


@pytest.mark.parametrize("precaution", ["NO_SEQ", "NO_SESSION", "NO_RESYNC", "NO_REDELIVERY"])
def test_each_precaution_is_needed(tmp_path, precaution):
    said = check(tmp_path, precaution)
    assert "errors: 1" in said, said


def test_the_model_uses_the_enums_names_and_knows_of_each_that_it_does_without():
    used = numbers()
    assert {"THREAD_NEW", "THREAD_RUNNABLE", "THREAD_BLOCKED", "TXN_OUTCOME", "RESYNC", "RUN", "COMMITTED", "STALE", "CPU_UNAVAILABLE"} == used.keys()
    every = {member.name for enum in ENUMS for member in enum}
    assert used.keys() | LEFT_OUT.keys() == every, "a new message, decision or outcome is modelled, or there is a reason why not"
    assert not used.keys() & LEFT_OUT.keys()


def test_the_code_that_the_model_names_is_there():
    named = re.findall(r"([\w/.]+\.(?:py|h)):(\w+)", MODEL.read_text())
    assert len(named) >= 10
    for path, function in named:
        text = (ROOT / path).read_text()
        assert re.search(rf"\b(?:def )?{function}\(", text), f"{path} has no {function}"
