"""A probe from the outside: started, set to zero, read and stopped. What it is attached by is a process of its own (`attached.py`).

That process runs under the system's Python: bcc is a package of the distribution for that Python alone, Wave's may be another;
and clang's 130 MB of memory, the mount of tracefs and the attached programs are then gone with one process, whatever ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from waveos.errors import ConfigError, MissingError, WaveError
from waveos.host.probes import headers
from waveos.host.probes.results import KINDS, Window
from waveos.host.probes.target import Target
from waveos.names import nearest

PYTHON = "/usr/bin/python3"
"""The Python that the distribution's bcc is installed for."""
_FOLDER = Path(__file__).parent
_ANSWER_S = 120.0
"""A probe compiles in half a second; in an emulated guest twenty times slower."""
_WATCH_ROUNDS = 100


class Probe:
    """One kind of probe over a target. `with Probe("runqlat", Target(pids=(1234,))) as probe: ...; probe.read()`.

    Entering compiles and attaches it (about half a second) and sets it to zero; leaving detaches it. `reset` and `read` may be called
    as often as one likes between: a measurement that is repeated pays for compiling once. Times are of CLOCK_MONOTONIC.
    Raises ConfigError for a target that is not there, MissingError where probes cannot run here; both leave nothing behind.
    """

    def __init__(self, name: str, target: Target | None = None) -> None:
        if name not in KINDS:
            raise ConfigError(f"no probe {name!r}{nearest(name, KINDS)}; there are: {', '.join(KINDS)}")
        self.name = name
        self.target = target or Target()
        self._kind = KINDS[name]
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._began_ns = 0
        self._result: dict[str, Any] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that holds the probe, while it is attached."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Probe:
        self.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(self) -> None:
        """Compile, attach, watch the target's threads, and begin at zero."""
        self.target.check()
        if os.geteuid() != 0:
            raise MissingError("probes need root, because they watch other users' threads, too; run the same with sudo")
        if not Path(PYTHON).exists():
            raise MissingError(f"probes run under the system's Python, {PYTHON}, for which the distribution has bcc; it is not here")
        self._headers, source = headers.find()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process; closed in close())
        try:
            self._process = subprocess.Popen(
                [PYTHON, "-I", str(_FOLDER / "attached.py"), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us, who then ask for what was measured
            )
            self._ask({"text": self.text(), "source": str(source) if source else None})
            self.watch(self.target.threads)
            self.reset()
        except BaseException:
            self.close()
            raise

    def text(self) -> str:
        """The C that is compiled."""
        parts = ["scope.c", *(["histogram.c"] if self._kind.histogram else []), f"{self.name}.c"]
        return self.target.prelude() + "".join(f'#line 1 "{part}"\n{(_FOLDER / part).read_text()}' for part in parts)

    def watch(self, listed: Any) -> None:
        """Watch the threads of `listed()`, and what they start. It is asked until it names none that is new: between two looks more may start."""
        if not self.target.limited:
            return
        watched: set[int] = set()
        for _ in range(_WATCH_ROUNDS):
            new = listed() - watched
            if not new:
                return
            self._ask({"do": "watch", "threads": sorted(new)})
            watched |= new

    def reset(self) -> None:
        """A new measurement begins now."""
        self._began_ns = self._ask({"do": "reset", "tables": [*self._counters, "lost"]})["at_ns"]

    def read(self) -> dict[str, Any]:
        """What was measured since `start` or the last `reset`; the probe goes on."""
        answer = self._ask({"do": "read", "tables": [*self._counters, *self._kind.state, "lost"]})
        window = Window(self._began_ns, answer["at_ns"])
        return {
            "probe": self.name,
            "seconds": window.seconds,
            **self._kind.summarize(answer["tables"], window),
            "lost": sum(sum(percpu) for _, percpu in answer["tables"]["lost"]),
            "target": self.target.describe(),
            "kernel": platform.release(),
            "headers": self._headers,
            "timing": "measured",
        }

    def stop(self) -> dict[str, Any]:
        """Return what was measured, and detach; the same again if asked again."""
        if self._result is None:
            self._result = self.read()
            self.close()
        return self._result

    def close(self) -> None:
        """Detach and forget; nothing to do twice."""
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError):
                process.stdin.close()  # its sign to end
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        if self._said is not None:
            self._said.close()
            self._said = None

    @property
    def _counters(self) -> Iterable[str]:
        return (*self._kind.counters, *(["histogram"] if self._kind.histogram else []))

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer. Raises what the answer, or its absence, means."""
        if self._process is None:
            raise WaveError(f"the probe {self.name} is not attached; start it first")
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then it has ended, and the lack of an answer says how
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        answer = self._line()
        if not answer:
            raise WaveError(f"the probe {self.name} ended by itself ({_ending(self._process)}); {self._last_said() or 'it said nothing'}")
        reply: dict[str, Any] = json.loads(answer)
        if "refused" in reply:
            raise self._refusal(*reply["refused"])
        return reply

    def _line(self) -> bytes:
        """The answer; b"" if the process has ended."""
        assert self._process is not None and self._process.stdout is not None
        handle, held, deadline = self._process.stdout.fileno(), b"", time.monotonic() + _ANSWER_S
        while not held.endswith(b"\n"):
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._process.kill()
                raise WaveError(f"the probe {self.name} did not answer within {_ANSWER_S:g} s; it was ended, and with it detached")
            more = os.read(handle, 1 << 20)
            if not more:
                return b""
            held += more
        return held

    def _refusal(self, what: str, reason: str) -> WaveError:
        if what == "bcc":
            return MissingError(f"probes need bcc, and {PYTHON} has none ({reason}): apt-get install python3-bpfcc")
        if what == "tracefs":
            return MissingError(f"probes need tracefs, and it cannot be mounted ({reason}): mount -t tracefs none /sys/kernel/tracing")
        why = first_error(self._everything_said()) or reason
        return MissingError(f"bcc cannot attach the probe {self.name} on {platform.release()} with headers of {self._headers}: {why}")

    def _everything_said(self) -> str:
        if self._said is None:
            return ""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def _last_said(self) -> str:
        lines = self._everything_said().strip().splitlines()
        return lines[-1] if lines else ""


def first_error(said: str) -> str:
    """The first line of clang's, or the verifier's last, that tells what is wrong."""
    for line in said.splitlines():
        if re.search(r"\berror:", line):
            return line.strip()
    lines = [line.strip() for line in said.splitlines() if line.strip() and not re.match(r"processed \d+ insns|HINT", line.strip())]
    return lines[-1] if lines else ""


def _ending(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)
    code = process.returncode
    return "still there" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"
