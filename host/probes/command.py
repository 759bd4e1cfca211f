"""A command that is held before its first step, so that a probe sees all of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from waveos.errors import ConfigError

_HOLD = "import os, sys; go = os.read(int(sys.argv[1]), 1); os.close(int(sys.argv[1])); go and os.execvp(sys.argv[2], sys.argv[2:])"
"""Waits for one byte, then becomes the command; if whoever started it has gone instead, it ends."""
_PATIENCE_S = 2.0
_STDERR = 2


class HeldCommand:
    """Started and held by entering; `go` lets it run; leaving ends it if it still runs. Its output goes to stderr: stdout is for data.

    Raises ConfigError for a command that there is not.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"no command {words[0] if words else ''!r} to run; give its path, or a name on PATH")
        self.words = list(words)

    def __enter__(self) -> HeldCommand:
        gate, self._gate = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _HOLD, str(gate), *self.words],
                pass_fds=(gate,),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
            )
        except BaseException:
            os.close(self._gate)
            raise
        finally:
            os.close(gate)
        self.pid = self._process.pid
        return self

    def go(self) -> None:
        """Let it run."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._gate, b"\n")

    def wait(self, timeout_s: float | None) -> int | None:
        """Its exit code (negative: the signal that ended it), None if it runs longer than that."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def __exit__(self, *raised: object) -> None:
        os.close(self._gate)
        if self._process.poll() is not None:
            return
        self._process.terminate()
        if self.wait(_PATIENCE_S) is None:
            self._process.kill()
            self._process.wait()
