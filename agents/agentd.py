"""agentd: the process that decides, for the hosts at the other end of its links.

It needs no privilege: hostd hands it the queues of an enclave (`shm:///run/wave/NAME/agent.sock`), or it finds a ring by name (`shm://NAME`) or in memory
that it shares with another machine (`bar://PATH`). It polls as an ordinary thread. When the host goes it waits for it to come back; an agent of a ring by
name ends with its host. Both end at SIGTERM, and when the policy of the last enclave fails. What takes long (finding a host, compiling a policy) is done
beside the loop, so that the other enclaves do not wait.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from waveos import log, notify, ring, tape
from waveos.agents.loop import ENCLAVE, POLICY_FAILED, TAPE, join, serve
from waveos.agents.plain import serve_plain
from waveos.agents.teller import Teller
from waveos.errors import ConfigError, LinkError, PolicyError, WaveError
from waveos.histogram import BINS, filled_ns
from waveos.link import MESSAGES, TXNS, open_link
from waveos.policy import load_policy
from waveos.policy.plain import PlainRuntime
from waveos.primitives import CoherentMemory, clock_ns
from waveos.process import end_with, start_time
from waveos.record import VERSION
from waveos.sched.laws import DEPTH, failure, make_runtime
from waveos.sched.records import KICKED, MAX_CPUS, MAX_THREADS, MESSAGE

SLICE_NS = 20_000_000
NETWORK = "zmq+tcp://"
STAYING = ("shm:///", "bar://")
"""Links that outlive their host: the agent waits for the next one."""
GUESTS = 64
"""Enclaves of other machines that one agentd serves at most."""
STUCK_S = 1.0
"""A plain policy that is away for longer is not said to be alive; systemd's own patience comes on top."""
IDLE_S = 0.05
"""At most between two looks while no enclave is served."""
TAPE_RECORDS = 16 * TAPE
PATIENCE_S = 5.0
SWITCH_S = 0.000_5
"""How long the compiling of another policy may keep the loop from going on."""
SIZES = {"cpus": (1, MAX_CPUS), "threads": (1, MAX_THREADS), "ahead": (0, DEPTH - 1)}
"""What a runtime is made for: least and most."""
RUNTIME_COUNTERS = ("waiting", "dropped", "restaged", "redelivered", "unserved")


@dataclass(frozen=True)
class Orders:
    """What the agent was told on its command line."""

    cpus: int = 8  # of enclaves whose host does not say
    threads: int = MAX_THREADS
    ahead: int = 0
    params: dict[str, float] = field(default_factory=dict)
    replay: bool = False
    idle_us: float = 0.0  # 0: poll always
    patience_s: float | None = None  # None: PATIENCE_S for a ring by name, for ever for hostd
    measure: bool = False
    record: Path | None = None
    status: Path | None = None  # where it tells of itself


class Unfit(LinkError):
    """What a host says of its enclave cannot be."""

    final = True


def find_sizes(facts: dict[str, Any], orders: Orders) -> dict[str, int]:
    """CPUs, threads and decisions ahead of an enclave whose host says this. Raises Unfit for what cannot be, ConfigError if it is this agent that says it."""
    found = {name: facts.get(name, getattr(orders, name)) for name in SIZES}
    for name, (least, most) in SIZES.items():
        if type(found[name]) is not int or not least <= found[name] <= most:
            what = f"{name} {found[name]!r:.40}: {least} to {most} can be"
            raise Unfit(f"the host says of its enclave {what}; mend what it says") if name in facts else ConfigError(f"--{what}")
    return found


class Task(threading.Thread):
    """Something that takes long, beside the loop; it does not keep the process from ending."""

    some_done = threading.Event()

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self.done = False
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """The thread's."""
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self.done = True
        Task.some_done.set()

    def result(self) -> Any:
        """What came of it. Raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result


class Served:
    """One enclave, from the search for its host on. `row` is its record of the compiled loop."""

    def __init__(self, url: str, policy: str | None, orders: Orders, row: np.ndarray[Any, Any], number: int) -> None:
        self.url, self.orders, self._row = url, orders, row
        self._policy, self._params = policy, orders.params
        self._stays = url.startswith(STAYING)
        self._number = number
        self._tapes = 0
        self._link: Any = None
        self._bound: Any = None
        self._runtime: Any = None
        self._tape_path: Path | None = None
        self._tape = np.zeros(TAPE_RECORDS if orders.record else 0, MESSAGE)
        self._times = np.zeros((3, BINS), np.int64) if orders.measure else None
        self._task: Task | None = None
        self._then: Callable[[Any], None] = self._found
        self._attended_s = math.inf
        self.over = False
        self._search()

    def _search(self) -> None:
        self._begin(self._open, self._found)

    def _begin(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self._task, self._then = Task(work), then

    # Finding the host

    def _open(self) -> Any:
        """Beside the loop: the link, and with a plain policy all that comes."""
        patience_s = self.orders.patience_s
        if patience_s is None:
            patience_s = math.inf if self._stays else PATIENCE_S
        subsystem = load_policy(self._policy).subsystem if self._policy else None
        if not self._stays:
            assert self._policy is not None
            self._bound, self._runtime = self._bind({}, self._policy, self._params)
            return open_link(self.url, side="agent", subsystem=subsystem, patience_s=patience_s)
        about = {"pid": os.getpid(), "policy": self._policy}
        return open_link(self.url, side="agent", subsystem=subsystem, patience_s=patience_s, prepare=self._prepare, about=about)

    def _prepare(self, facts: dict[str, Any]) -> dict[str, Any]:
        """hostd has told about its enclave: compile for it. Its policy counts where the agent has none of its own."""
        if self._policy is None:
            if not facts.get("policy"):
                raise ConfigError(f"{self.url}: neither hostd nor this agent names a policy; give one: wave agentd {self.url} POLICY")
            self._policy, self._params = facts["policy"], facts.get("params") or {}
        self._bound, self._runtime = self._bind(facts, self._policy, self._params)
        return {"policy": self._policy, "params": self._params}

    def _bind(self, facts: dict[str, Any], policy: str, params: dict[str, float]) -> tuple[Any, Any]:
        """The policy, compiled, and its runtime; (class, None) for a plain one."""
        kind, orders = load_policy(policy), self.orders
        mine = kind.subsystem.SUBSYSTEM
        if facts.get("subsystem", mine) != mine:  # a ring by name, or a BAR, says it when it is joined
            raise PolicyError(f"policy {policy!r} is of another subsystem than the enclave")
        if getattr(kind.subsystem, "PLAIN", False):
            PlainRuntime(kind, params)  # what is wrong with it is said now, and what its begin compiles is compiled
            return kind, None
        sizes = find_sizes(facts, orders)
        bound = kind.bind(n_cpus=sizes["cpus"], params=params)
        return bound, make_runtime(bound, **sizes)

    def _found(self, link: Any) -> None:
        self._link = link
        if self._runtime is None:
            attend = self._attend_plain if getattr(link, "handed", None) else None
            self._begin(lambda: serve_plain(link, self._bound, self._params, replay=self.orders.replay, attend=attend), self._plain_over)
        else:
            self._join()

    def _plain_over(self, _result: Any) -> None:
        self._attended_s = math.inf
        self._lost()

    def goes_round(self) -> bool:
        """False while a plain policy, which decides in a thread of its own, has not come back from a batch for a while. Others are part of the loop."""
        return time.monotonic() - self._attended_s < STUCK_S

    def _attend_plain(self, told: Callable[[], dict[str, Any]]) -> tuple[Any, dict[str, float]] | None:
        """Beside the loop, between two batches of a plain policy: what hostd asks for. The policy that is to decide from now on, if it is another."""
        self._attended_s = time.monotonic()
        change = None
        for request in self._link.handed.requests():
            if "report" in request:
                about = {"policy": self._policy, "params": self._params, "pid": os.getpid(), "start": start_time(os.getpid())}
                self._link.handed.answer({"report": {**told(), **about}})
            elif "set-policy" in request:
                name, params = request["set-policy"]["policy"], request["set-policy"].get("params") or {}
                try:
                    kind, _ = self._bind(self._link.handed.facts, name, params)
                except (WaveError, ValueError) as error:
                    self._link.handed.answer({"unwilling": str(error)})
                    continue
                self._policy, self._params, self._bound = name, params, kind
                self._link.renew({"policy": name, "params": params})
                change = kind, params
        return change

    def _join(self) -> None:
        """Let the loop serve the link's present queues with the present runtime."""
        self._begin_tape()
        handed = self._link.handed
        tape_records = self._tape if self._tape_path else None
        doorbell = handed.doorbell if handed else -1
        bell = handed.facts.get("bell", KICKED) if handed else KICKED
        up, down = self._link.queue(MESSAGES), self._link.queue(TXNS)
        join(self._row, up, down, self._runtime, replay=self.orders.replay, doorbell=doorbell, bell=bell, tape=tape_records, times=self._times)

    # While it is served, between two slices of the loop

    def step(self) -> None:
        """Go on with what is not the loop's. Raises WaveError when this enclave cannot be served any more."""
        if self._task is not None and self._task.done:
            done, self._task = self._task, None
            self._then(done.result())
        if self._link is None or self._runtime is None or self._row["serving"][0] == 0:
            return
        self._save_tape()
        try:
            self._link.check()
            if self._link.handed:
                for request in self._link.handed.requests():
                    self._answer(request)
        except LinkError:
            self._lost()

    def _answer(self, request: dict[str, Any]) -> None:
        if "report" in request:
            self._link.handed.answer({"report": self.report()})
        elif "set-policy" in request:
            wish = request["set-policy"]
            name, params, facts = wish["policy"], wish.get("params") or {}, self._link.handed.facts
            self._begin(lambda: self._try_bind(facts, name, params), self._change)

    def _try_bind(self, facts: dict[str, Any], policy: str, params: dict[str, float]) -> Any:
        try:
            bound, runtime = self._bind(facts, policy, params)
        except (WaveError, ValueError) as error:
            return str(error)
        return policy, params, bound, runtime

    def _change(self, result: Any) -> None:
        """The other policy is compiled, or why not: the old one ran on until here."""
        if self._row["serving"][0] == 0:
            return
        try:
            if isinstance(result, str):
                self._link.handed.answer({"unwilling": result})
                return
            self._policy, self._params, self._bound, self._runtime = result
            self._row["serving"] = 0
            self._link.renew({"policy": self._policy, "params": self._params})
            self._join()
        except LinkError:
            self._lost()

    def _lost(self) -> None:
        """The host is gone: wait for it, or have nothing to decide any more."""
        self._row["serving"] = 0
        self._save_tape()
        if self._link is not None:
            self._link.close()
            self._link = None
        if self._stays and self.orders.patience_s != 0:
            self._search()
        else:
            self.over = True

    def failed(self) -> WaveError | None:
        """Why its policy failed, if it did."""
        return failure(self._runtime, self._bound) if self._runtime is not None and self._runtime["failed"][0] else None

    def report(self) -> dict[str, Any]:
        """Counters since the link was joined, and, where times are measured, three histograms as (lower edge in ns, count)."""
        told: dict[str, Any] = {name: int(self._row[name][0]) for name in ("messages", "decisions", "batches", "rings")}
        told |= {name: int(self._runtime[name][0]) for name in RUNTIME_COUNTERS}
        told |= {"policy": self._policy, "params": self._params, "pid": os.getpid(), "start": start_time(os.getpid())}
        if self._times is not None:
            told |= {f"{name}_ns": filled_ns(times) for name, times in zip(("event", "wakeup", "decide"), self._times, strict=True)}
        return told

    @property
    def name(self) -> str:
        """What it is called where others are served as well."""
        return self.url

    @property
    def whose(self) -> tuple[str, str]:
        """The host ("": this one) and the enclave."""
        handed = getattr(self._link, "handed", None)
        return "", str(handed.facts.get("enclave") or self.url) if handed else self.url

    def tell(self) -> dict[str, Any]:
        """For whoever asks this process: whose it is and how it goes. A plain policy's report is its host's to have."""
        host, enclave = self.whose
        compiled = bool(self._row["serving"][0])
        serving = compiled or (self._link is not None and self._runtime is None)
        report = self.report() if compiled else None
        return {"host": host, "enclave": enclave, "url": self.url, "policy": self._policy, "serving": serving, "report": report}

    def close(self) -> None:
        """Leave the host."""
        self._row["serving"] = 0
        with contextlib.suppress(WaveError):
            self._save_tape()
        if self._link is not None:
            self._link.close()

    # The tape

    def _begin_tape(self) -> None:
        """A file for each time that the host's whole state comes: they can be replayed from their begin."""
        if self.orders.record is None:
            return
        self._tapes += 1
        path = self.orders.record
        if self._number:
            path = path.with_name(f"{path.name}-{self._number}")
        self._tape_path = path if self._tapes == 1 else path.with_name(f"{path.name}.{self._tapes}")
        head = self._runtime[0]
        facts = {name: int(head[name]) for name in ("cpus", "threads", "ahead")}
        tape.begin(self._tape_path, {"policy": self._policy, "params": self._params, **facts})

    def _save_tape(self) -> None:
        if self._tape_path is not None and (n := int(self._row["taped"][0])):
            tape.append(self._tape_path, self._tape[:n])
            self._row["taped"] = 0


def run_agent(urls: list[tuple[str, str | None]], orders: Orders) -> None:
    """Serve these (url, policy or None) until all hosts are gone for good. Raises the error of the last one that failed."""
    ending: list[int] = []  # seen between two steps: an exception could come anywhere, with a lock in mid-release, say
    sys.setswitchinterval(SWITCH_S)
    if not all(policy and getattr(load_policy(policy).subsystem, "PLAIN", False) for _, policy in urls):
        _compile()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: ending.append(number))
    addresses = [(url, policy) for url, policy in urls if policy and url.startswith(NETWORK)]
    urls = [(url, policy) for url, policy in urls if not url.startswith(NETWORK)]
    rows = np.zeros(len(urls) + (GUESTS if addresses else 0), ENCLAVE)
    served: list[Served] = []
    reception: Any = None
    teller = Teller(orders.status) if orders.status else None
    last: Exception | None = None
    idle_ns = int(orders.idle_us * 1_000)
    try:
        served = [Served(url, policy, orders, rows[i : i + 1], i) for i, (url, policy) in enumerate(urls)]
        if addresses:
            reception = import_module("waveos.agents.remote").Reception(addresses, orders, rows[len(urls) :], len(urls))
        look_ns = 0
        notify.ready()
        while (served or reception) and not ending:
            if all(each.goes_round() for each in served):
                notify.alive()
            if reception:
                served += reception.step(alone=not rows["serving"][: len(urls)].any())
            if rows["serving"].any():
                status = serve(rows, idle_ns, 0 if reception else clock_ns() + SLICE_NS)
                if reception and status != POLICY_FAILED and clock_ns() < look_ns:
                    continue
                look_ns = clock_ns() + SLICE_NS
            else:
                status = None
                if not reception:
                    Task.some_done.wait(IDLE_S)
                Task.some_done.clear()
            if teller:
                teller.step(served)
            for each in list(served):
                try:
                    if status == POLICY_FAILED and (error := each.failed()):
                        raise error
                    each.step()
                except Exception as error:  # of whatever kind: it is one enclave's
                    last, why = error, _explain(error)
                    if len(served) > 1 or reception:
                        log.say("agentd", f"{each.name}: {why}; the others go on", "error", url=each.url)
                    each.close()
                    served.remove(each)
                    if reception:
                        reception.forget(each, why)
                    continue
                if each.over:
                    served.remove(each)
                    if reception:
                        reception.forget(each)
    finally:
        notify.stopping()
        for each in served:
            each.close()
        if reception:
            reception.close()
        if teller:
            teller.close()
    if last is not None and not ending:
        raise last


def _explain(error: Exception) -> str:
    """What ended an enclave, in one line; what nobody foresaw with its place."""
    if isinstance(error, WaveError):
        return str(error)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return f"{text} ({Path(frame.f_code.co_filename).name}:{line}); this is a bug in Wave, please report it"


def _compile() -> None:
    """Have all that a host would wait for, once it has replayed its state, compiled or loaded before."""
    memory, own = np.zeros(ring.words(2), np.int64), np.zeros(ring.OWN_WORDS, np.int64)
    ring.create(CoherentMemory(memory), 2, VERSION, 1, 1)
    ring.compiled().join_consumer(memory, own, VERSION, 1, 2)
    ring.compiled().join_producer(memory, own, VERSION, 1, 2)
    serve(np.zeros(1, ENCLAVE), 0, 0)


def begin_life(core: int | None, nice: int, parent: int | None = None) -> None:
    """Bind this process to a core, make it the one that waits when another wants that core, and let SIGTERM and SIGINT end it cleanly.

    With a `parent` it ends when that process does, however that ends.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    if parent is not None and not end_with(parent, signal.SIGTERM):
        raise SystemExit(0)
    if core is not None:
        try:
            os.sched_setaffinity(0, {core})
        except OSError:
            raise ConfigError(f"--core {core}: this process may use the cores {sorted(os.sched_getaffinity(0))}") from None
    if nice:  # a service may be forbidden to ask for what it has
        os.nice(nice)


def _leave(_number: int, _frame: object) -> None:
    os._exit(0)  # nothing is begun, and a compiler is not to be interrupted by an exception


if __name__ == "__main__":
    from waveos.cli import run

    sys.exit(run(["agentd", *sys.argv[1:]]))
