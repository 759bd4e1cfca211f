"""What members of a tormented enclave do: they wait, wake one another, compute, fork, start threads, change themselves; and each counts its progress.

    python -S -E workers.py KIND FD SLOT [arguments of the kind]

FD is shared memory of words: word 0 says stop, and each worker has a slot of 8 words of its own, of which it writes three: its progress, when that was
last, and the longest pause between two steps since somebody set that word to 0.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time

WORDS = 8
COUNT, LAST, GAP = range(3)
SLOTS = 32


class Slot:
    """A worker's words."""

    def __init__(self, words: memoryview, number: int) -> None:
        self._words, self._at = words, WORDS * number
        self._last = time.monotonic_ns()

    def step(self) -> bool:
        """One step further; False once it is to end."""
        now = time.monotonic_ns()
        words, at = self._words, self._at
        if now - self._last > words[at + GAP]:
            words[at + GAP] = now - self._last
        words[at + COUNT] += 1
        words[at + LAST] = self._last = now
        return not words[0]


def compute(ms: float) -> None:
    """Use the CPU for that long, by the clock."""
    end = time.monotonic_ns() + int(ms * 1e6)
    while time.monotonic_ns() < end:
        pass


def tick(slot: Slot) -> None:
    """Wants the CPU for a moment, a thousand times a second."""
    while slot.step():
        time.sleep(0.001)


def ping(slot: Slot, read: str, write: str, first: str) -> None:
    """One of two that wake each other."""
    rounds, going = 0, True
    if first == "1":
        os.write(int(write), b".")
    while going and os.read(int(read), 1):
        compute(0.05)
        going = slot.step()
        rounds += 1
        if rounds % 16 == 0:
            time.sleep(0.004)
        try:
            os.write(int(write), b".")
        except BrokenPipeError:  # the other was told to end first
            return


def spin(slot: Slot, longest_ms: str) -> None:
    """Computes in bursts, and sleeps as long."""
    rng = random.Random(os.getpid())
    while slot.step():
        burst_ms = rng.uniform(0.1, float(longest_ms))
        compute(burst_ms)
        time.sleep(3 * burst_ms / 1_000)


def give_way(slot: Slot) -> None:
    """Offers the CPU to others again and again."""
    while slot.step():
        for _ in range(4):
            compute(0.1)
            os.sched_yield()
        time.sleep(0.003)


def beget(slot: Slot) -> None:
    """Has children and grandchildren, which end at once, after a little work, or orphaned."""
    rng = random.Random(os.getpid())
    while slot.step():
        orphaned = rng.random() < 0.3
        child = os.fork()
        if child == 0:
            grandchild = os.fork()
            if grandchild == 0:
                compute(0.2)
                os._exit(7)
            if not orphaned:
                compute(0.2)
                if os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) != 7:
                    os._exit(1)
            os._exit(3)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 3:
            raise SystemExit("a child was lost")
        time.sleep(0.02)


def weave(slot: Slot) -> None:
    """Threads that wake one another, and threads that live for a moment."""
    turn, done = threading.Semaphore(0), threading.Semaphore(0)
    over = False

    def other() -> None:
        while True:
            turn.acquire()
            if over:
                return
            compute(0.05)
            done.release()

    partner = threading.Thread(target=other)
    partner.start()
    while slot.step():
        turn.release()
        done.acquire()
        brief = threading.Thread(target=compute, args=(0.1,))
        brief.start()
        brief.join()
        time.sleep(0.005)
    over = True
    turn.release()
    partner.join()


def meddle(slot: Slot) -> None:
    """Changes its own scheduling, as a program may."""
    everywhere = os.sched_getaffinity(0)
    while slot.step():
        for policy, priority in ((os.SCHED_OTHER, 0), (os.SCHED_BATCH, 0), (os.SCHED_FIFO, 3), (os.SCHED_RR, 7)):
            os.sched_setscheduler(0, policy, os.sched_param(priority))
            compute(0.2)
            os.sched_setaffinity(0, {min(everywhere)})
            time.sleep(0.01)
            os.sched_setaffinity(0, everywhere)
            slot.step()


KINDS = {each.__name__: each for each in (tick, ping, spin, give_way, beget, weave, meddle)}

if __name__ == "__main__":
    kind, fd, number, *arguments = sys.argv[1:]
    KINDS[kind](Slot(memoryview(mmap.mmap(int(fd), 8 * WORDS * SLOTS)).cast("q"), int(number)), *arguments)
