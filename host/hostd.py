"""hostd: the daemon that owns an enclave on this machine. It enforces what an agent decides and decides nothing.

It starts as root: puts back what a dead predecessor left, finds the members, loads the mechanism, and then gives up all that it needs no more. From then on
it is one loop over the doorbell, the mechanism's events, two sockets, a tick and signals. It ends when it is stopped or nobody is left in the enclave, and
leaves the machine as it was. Whatever it changes is in the journal first, so when it is killed its next start, or `wave restore`, puts that back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from waveos import log, notify
from waveos.admin import USER as ADMIN_USER
from waveos.errors import ConfigError, MissingError, PolicyError, WaveError
from waveos.handover import Message
from waveos.host import changes, privilege
from waveos.host.doors import AgentDoor, Allowed, Client, ControlDoor
from waveos.host.enclave import Cgroup, Command, parse_cpus, show_cpus
from waveos.host.poll import Poll
from waveos.host.restore import Journal, names, owner_alive, path_of, read
from waveos.host.settings import Settings
from waveos.process import start_time

REST = 3.0
"""Where hostd is real-time its ticks take a quarter of a CPU at most: others are to come up there, on an emulated processor too, where a tick takes 8 ms."""
LOOK_TICKS = 20
"""Ticks between two looks at who belongs to the enclave."""
REPORT_MS = 1_000
"""How long a status waits for the agent's part."""
ASKED_AT_ONCE = 4
"""A client's questions that are answered together: each takes hostd a millisecond, in which no member runs on its CPU."""
BACK_OFF_S = (0.1, 5.0)
"""An agent that died is started again after the first, doubled each time up to the second; one that lived longer than that begins anew."""
HOPELESS = (ConfigError.exit_code, PolicyError.exit_code, MissingError.exit_code)
"""Of a first agent: what it was told cannot be, and another would say so again."""
STOP_S = 3.0
WISH_BYTES = 8_192
"""Of a policy's name (or path) and parameters, as JSON."""
CACHE = Path("/var/cache/waveos")
"""Compiled policies of agents that run as users without a home."""


class Hostd:
    """One enclave's daemon. `run` returns the exit status: the command's, if one was started for the enclave."""

    def __init__(self, settings: Settings) -> None:
        """Raises WaveError, with the machine as it was, when the enclave cannot be had."""
        privilege.need_root()
        notify.look()
        self.settings = settings
        self._room: Any = import_module(f"waveos.host.{settings.subsystem}.hosted")
        self.policy, self.params = self._chosen = settings.policy, settings.params  # what runs, and what an agent that we start is to run
        self._stack = contextlib.ExitStack()
        self._began = time.monotonic()
        self._generation = self._attachments = self._lost = 0
        self._attached_s = 0.0
        self._ticks = 0
        self._over = False
        self._hopeless = 0
        self._faults = (0, 0)
        self._child: subprocess.Popen[bytes] | None = None
        self._child_s = self._again_s = 0.0
        self._back_off_s = BACK_OFF_S[0]
        self._waiting: list[tuple[float, Client, bool]] = []
        self._cores = os.sched_getaffinity(0)
        self._members: set[int] = set()
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        told, own = self.settings, self.settings.hostd
        self._agent_user = privilege.account(told.agent.user) if told.agent.user else None
        cpus = parse_cpus(told.cpus) if told.cpus else []
        own_cpu = own.cpu if own.cpu is not None or not cpus else cpus[0]
        if told.agent.core is not None and told.agent.core not in self._cores:
            raise ConfigError(f"--agent-core {told.agent.core}: hostd may use the CPUs {show_cpus(sorted(self._cores))}")
        if told.agent.start and told.agent.core in cpus:
            raise ConfigError(f"--agent-core {told.agent.core} is a CPU of the enclave: the agent polls, so give it another")
        uids = self._choosers = {0, os.geteuid(), *([self._agent_user.uid] if self._agent_user else [])}
        gid = privilege.group(own.group) if own.group else None
        self._orderers = {0, os.geteuid(), *privilege.uids(ADMIN_USER)}
        self.journal = Journal(told.enclave)
        self._stack.callback(self._restore)
        for line in self.journal.recovered:
            self._tell(f"put back what a dead hostd left: {line}", restored=line)
        self.enclave = self._room.find_members(told)
        self._stack.callback(self.enclave.close)
        self._refuse_others(self._room.claims(self.enclave))
        self.mechanism = self._room.make(told, self.enclave, self.journal, self._tell)
        self._stack.callback(self.mechanism.close)
        self._adopt_all()
        self.poll = Poll()
        self._stack.callback(self.poll.close)
        folder = self.journal.path.parent
        may = Allowed(frozenset(uids), gid)
        self.agents = AgentDoor(self.poll, folder / "agent.sock", may, self._facts, self._attach, self._agent_gone)
        self._stack.callback(self.agents.close)
        self.control = ControlDoor(self.poll, folder / "control.sock", Allowed(frozenset(self._orderers), gid), self._do)
        self._stack.callback(self.control.close)
        for fd in (self.mechanism.doorbell, *self.mechanism.events):
            self.poll.add(fd, self.mechanism.attend)
        priority = self._room.PRIORITY if own.priority is None else own.priority
        self.poll.every(self._room.TICK_MS, self._tick, rest=REST if priority else 0.0)
        self.poll.on_signals([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD], self._signalled)
        self._stack.callback(self._stop_agent)
        if told.agent.start:
            self._start_agent()
        for line in privilege.settle_down(own_cpu, priority):
            self._tell(line)
        if not own.keep_capabilities:
            privilege.keep_only((*privilege.HOSTD, *getattr(self.mechanism, "capabilities", ())))
        self._faults = privilege.page_faults()

    def _refuse_others(self, claims: set[tuple[str, Any]]) -> None:
        """Raises ConfigError if something of ours, a thread say, belongs to another live enclave."""
        for name in names():
            if name == self.settings.enclave:
                continue
            owner, entries = read(path_of(name))
            taken = {(entry["kind"], entry.get("what")) for entry in entries} if owner_alive(owner) else set()
            for kind, what in sorted(taken & claims)[:1]:
                raise ConfigError(f"{kind} {what} belongs to the enclave {name!r} (pid {owner['pid']}) already; a {kind} has one enclave")

    def _adopt_all(self) -> None:
        """Take all members in; threads that were born meanwhile as well. Raises ConfigError when one cannot be had."""
        for pid, session in self.enclave.elders():
            try:
                changes.note_heirs(self.journal, pid, session)
            except ProcessLookupError:
                pass  # it has ended
            except OSError as error:
                raise ConfigError(f"cannot take process {pid} into the enclave: {error.strerror or error}") from error
        for _ in range(100):
            fresh = [tid for tid in self.enclave.threads() if tid not in self._members]
            for tid in fresh:
                self._adopt(tid)
            if not fresh:
                break
        if isinstance(self.enclave, Command):
            self.enclave.go()

    def _adopt(self, tid: int) -> None:
        try:
            self.mechanism.adopt(tid)
            self._members.add(tid)
        except ProcessLookupError:
            pass  # it has ended
        except OSError as error:
            raise ConfigError(f"cannot take thread {tid} into the enclave: {error.strerror or error}") from error

    def run(self) -> int:
        """Serve until stopped, until nobody is left, or until its first agent says that it cannot begin."""
        notify.ready()
        try:
            while not self._over:
                self.poll.once()
                notify.alive()
        finally:
            notify.stopping()
            self.close()
        if self._hopeless:
            return self._hopeless
        if isinstance(self.enclave, Command):
            status = self.enclave.process.poll()
            return 0 if status is None else status if status >= 0 else 128 - status
        return 0

    def _tell(self, line: str, level: log.Level = "info", **fields: Any) -> None:
        log.say("hostd", line, level, enclave=self.settings.enclave, **fields)

    def close(self) -> None:
        """Everything as it was. Twice does no harm."""
        self._stack.close()

    def _restore(self) -> None:
        for line in self.journal.close():
            self._tell(f"cannot be put back: {line}; `wave restore {self.settings.enclave}` tries again", "error")

    # The agent

    def _facts(self) -> Message:
        return {
            "enclave": self.settings.enclave,
            "subsystem": self._room.SUBSYSTEM,
            **self._room.facts(self.settings, self.enclave, self.mechanism),
            "policy": self.policy,
            "params": self.params,
        }

    def _attach(self, ready: Message) -> tuple[Message, list[int]]:
        """The agent's policy is compiled: empty rings, the whole state, and the descriptors for it. Raises ConfigError for nonsense, and WaveError when the
        mechanism cannot be had again."""
        policy, params = ready.get("policy"), ready.get("params") or {}
        if not _is_wish(policy, params):
            raise ConfigError(f'ready may have "policy", a name, and "params", a table of numbers, all in {WISH_BYTES} bytes')
        self._generation += 1
        self.mechanism.agent_here(self._generation)
        self.policy, self.params = policy or self.policy, params
        if (
            self.agents.agent is not None and self.agents.agent.uid in self._choosers
        ):  # one of the group may decide, but names nothing for us to start
            self._chosen = self.policy, self.params
        self._attachments += 1
        self._attached_s = time.monotonic()
        if hasattr(self._room, "AGENT"):  # whose agent serves something else than queues
            told, descriptors = self.mechanism.hand_over()
            return {"generation": self._generation, **told}, descriptors
        queues = [self.mechanism.queues[name] for name in ("messages", "txns")]
        told = {"generation": self._generation, "bytes": [size for _, size in queues]}
        return told, [*(fd for fd, _ in queues), self.mechanism.doorbell]

    def _agent_gone(self) -> None:
        self._lost += 1
        self.policy, self.params = self._chosen
        self.mechanism.agent_gone()

    def _start_agent(self) -> None:
        """A child of ours that runs as the user it is told to, on its own core, as an ordinary process."""
        agent = self.settings.agent
        module, scheme = getattr(self._room, "AGENT", ("waveos.agents.agentd", "shm"))
        command = [sys.executable, "-P", "-m", module, f"{scheme}://{self.agents.path}"]
        if not self._room.AGENT_ASKS and self.policy is not None:
            command += [self.policy, *(word for key, value in self.params.items() for word in ("--param", f"{key}={value!r}"))]
        command += ["--nice", str(agent.nice)]
        command += ["--idle-us", str(agent.idle_us), "--parent", str(os.getpid())]
        command += ["--core", str(agent.core)] if agent.core is not None else []
        command += ["--measure"] if agent.measure else []
        command += ["--record", str(agent.record)] if agent.record else []
        command += ["--log", "json"] if log.as_json() and module == "waveos.agents.agentd" else []
        environment = dict(os.environ)
        as_user: dict[str, Any] = {}
        if self._agent_user is not None:
            as_user = {"user": self._agent_user.uid, "group": self._agent_user.gid, "extra_groups": []}
            if "XDG_CACHE_HOME" not in environment:
                environment["XDG_CACHE_HOME"] = str(self._cache_of(self._agent_user))
            environment |= {"HOME": "/", "USER": self._agent_user.name}
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cores)  # which the child gets, though we are bound to one
        try:
            self._child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, **as_user)
        except (OSError, subprocess.SubprocessError) as error:
            name = self._agent_user.name if self._agent_user else "this user"
            raise ConfigError(f"cannot start the agent: {error}; {name} must be able to run {sys.executable}, with all that it links to") from error
        finally:
            os.sched_setaffinity(0, own)
        self._child_s = time.monotonic()

    def _cache_of(self, user: privilege.Account) -> Path:
        folder = CACHE / user.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.chown(folder, user.uid, user.gid)
        except OSError as error:
            raise ConfigError(f"{folder}, where the agent keeps compiled policies: {error.strerror}") from error
        return folder

    def _look_after_agent(self) -> None:
        """Start an agent that died again, after a while that grows."""
        if self._child is not None and (status := self._child.poll()) is not None:
            if status in HOPELESS and not self._attachments:
                self._tell(f"its agent cannot begin (status {status}; it has said why), so the enclave ends", "error", status=status)
                self._child, self._hopeless, self._over = None, status, True
                return
            lived_s = time.monotonic() - self._child_s
            self._back_off_s = BACK_OFF_S[0] if lived_s > BACK_OFF_S[1] else min(2 * self._back_off_s, BACK_OFF_S[1])
            line = f"its agent (pid {self._child.pid}) ended with status {status}; another starts in {self._back_off_s:g} s"
            self._tell(line, "warning", pid=self._child.pid, status=status, again_s=self._back_off_s)
            self._child, self._again_s = None, time.monotonic() + self._back_off_s
        if self._again_s and time.monotonic() >= self._again_s:
            self._again_s = 0.0
            try:
                self._start_agent()
            except ConfigError as error:
                self._tell(str(error), "error")
                self._again_s = time.monotonic() + BACK_OFF_S[1]

    def _stop_agent(self) -> None:
        child, self._child, self._again_s = self._child, None, 0.0
        if child is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(OSError):
                child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_S)
                return

    # Ticks and signals

    def _tick(self) -> None:
        self.mechanism.tick()
        self._ticks += 1
        if self._waiting:
            now = time.monotonic()
            for asked in [each for each in self._waiting if each[0] <= now]:
                self._tell_status(asked, None)
        if self._again_s:
            self._look_after_agent()
        if self._ticks % LOOK_TICKS == 0:
            self._look()

    def _look(self) -> None:
        """Who has come into the cgroup, who has left it; is anybody left?"""
        if isinstance(self.enclave, Cgroup):
            now = set(self.enclave.threads())
            for tid in now - self._members:
                try:
                    self._adopt(tid)
                except WaveError as error:
                    self._tell(str(error), "warning", tid=tid)
                    self._members.add(tid)  # said once
            for tid in self._members - now:
                if start_time(tid) is not None:
                    self.mechanism.release(tid)
            self._members &= now
        if self.enclave.over():
            self._over = True

    def _signalled(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._look_after_agent()
            if isinstance(self.enclave, Command) and self.enclave.over():
                self._over = True
        else:
            self._over = True

    # What people ask

    def _do(self, request: Message, client: Client) -> None:
        match request["do"]:
            case "status" if sum(each[1] is client for each in self._waiting) >= ASKED_AT_ONCE:
                client.answer({"ok": False, "error": "too many questions at once: ask again once those before are answered"})
            case "status":
                asked = (time.monotonic() + REPORT_MS / 1_000, client, bool(request.get("detail")))
                self._waiting.append(asked)
                self.agents.ask("report", {"report": {}}, lambda answer: self._tell_status(asked, answer))
            case "watch" if client.peer.uid in (0, os.geteuid()):
                client.answer(*self._watched())
            case "watch":
                client.answer({"ok": False, "error": f"watch is for root; user {client.peer.uid} may ask for status"})
            case "set-policy" | "stop" if client.peer.uid not in self._orderers:
                client.answer({"ok": False, "error": f"{request['do']} is for root and {ADMIN_USER}; user {client.peer.uid} may ask for status"})
            case "stop":
                client.answer({"ok": True})
                self._over = True
            case "set-policy":
                self._set_policy(request, client)
            case other:
                client.answer({"ok": False, "error": f"hostd does not know {other!r}; it knows status, watch, set-policy and stop"})

    def _set_policy(self, request: Message, client: Client) -> None:
        wish = {"policy": request.get("policy"), "params": request.get("params") or {}}
        if wish["policy"] is None or not _is_wish(**wish):
            line = f'set-policy wants "policy", a name, and may have "params", a table of numbers, all in {WISH_BYTES} bytes'
            client.answer({"ok": False, "error": line})
            return
        if not self.agents.attached:
            client.answer({"ok": False, "error": "the enclave has no agent now; start one, or wait until it is back"})
            return
        was = self.policy

        def answered(message: Message | None) -> None:
            if message is None:
                client.answer({"ok": False, "error": f"the agent went away before it had the policy; {was!r} is what the next one runs"})
            elif "unwilling" in message:
                client.answer({"ok": False, "error": f"{message['unwilling']}; {was!r} runs on"})
            else:
                client.answer({"ok": True, "policy": self.policy, "params": self.params, "generation": self._generation, "was": was})

        self.agents.ask("ready", {"set-policy": wish}, answered)

    def _tell_status(self, asked: tuple[float, Client, bool], answer: Message | None) -> None:
        if not any(each is asked for each in self._waiting):
            return  # it was told already
        self._waiting = [each for each in self._waiting if each is not asked]
        detail = {"on_cpus": self.mechanism.on_cpus()} if asked[2] and hasattr(self.mechanism, "on_cpus") else {}
        asked[1].answer({"ok": True, **self.status(), **detail, "report": (answer or {}).get("report")})

    def _watched(self) -> tuple[Message, list[int]]:
        """For one who looks on: the memory of both queues, and who is meant by the numbers in them."""
        queues = getattr(self.mechanism, "queues", None)
        if not queues:
            return {"ok": False, "error": f"an enclave of {self.settings.subsystem} has no queues of messages to look at"}, []
        pids = self.mechanism.pids() if hasattr(self.mechanism, "pids") else {}
        told = {"subsystem": self.settings.subsystem, "mechanism": self.mechanism.name, "policy": self.policy, "params": self.params, "pids": pids}
        told |= {"cpus": self.enclave.cpus, "generation": self._generation, "bytes": [queues[name][1] for name in ("messages", "txns")]}
        return {"ok": True, **told}, [queues[name][0] for name in ("messages", "txns")]

    def status(self) -> Message:
        """What there is to know, but for the agent's own part."""
        faults = [now - then for now, then in zip(privilege.page_faults(), self._faults, strict=True)]
        agent = self.agents.agent
        return {
            "enclave": self.settings.enclave,
            "pid": os.getpid(),
            "subsystem": self.settings.subsystem,
            "mechanism": self.mechanism.name,
            "cpus": show_cpus(self.enclave.cpus),
            "members": self.enclave.describe(),
            "policy": self.policy,
            "params": self.params,
            "agent": {"pid": agent.pid, "uid": agent.uid, "for_s": time.monotonic() - self._attached_s} if agent and self.agents.attached else None,
            "attachments": self._attachments,
            "agents_lost": self._lost,
            "agents_refused": self.agents.refused,
            "counters": self.mechanism.counters(),
            "hostd": {
                "up_s": time.monotonic() - self._began,
                "cpu_ns": privilege.cpu_time_ns(),
                "page_faults": faults[0],
                "page_faults_from_disk": faults[1],
                "wakeups": self.poll.wakeups,
                "journal": len(self.journal.entries),
            },
        }


def _is_wish(policy: Any, params: Any) -> bool:
    """Whether a peer that names these can be taken at its word: they are told to people, and to the next agent, perhaps on its command line."""
    if not (policy is None or (isinstance(policy, str) and policy.isprintable() and not policy.startswith("-"))) or not isinstance(params, dict):
        return False
    for name, value in params.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        if not (number and name.isprintable() and "=" not in name):
            return False
    return len(json.dumps([policy, params])) <= WISH_BYTES


def serve(settings: Settings) -> int:
    """Run hostd with these settings until it ends; the exit status. Raises WaveError when it cannot begin."""
    daemon = Hostd(settings)
    cpus = f"CPUs {show_cpus(daemon.enclave.cpus)}, " if daemon.enclave.cpus else ""
    line = f"{cpus}{daemon.enclave.describe()}, mechanism {daemon.mechanism.name}"
    log.say("hostd", line, enclave=settings.enclave, pid=os.getpid(), policy=settings.policy, subsystem=settings.subsystem)
    return daemon.run()
