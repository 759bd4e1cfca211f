"""The `wave` command. Errors that Wave explains are one line on stderr and an exit code; stdout is data, stderr is talk.

`main` is all that is imported at start; the commands come from `waveos.cli.app`, and what they need is imported when they run.
A command returns None, or its exit code. It raises WaveError for what the user can mend.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any

from waveos.errors import ConfigError, WaveError

BUG = 70
INTERRUPTED = 130
PIPE_CLOSED = 141

_KINDS: list[type[WaveError]] = sorted(WaveError.__subclasses__(), key=lambda kind: kind.exit_code)
EXIT_CODES = {
    0: "done",
    WaveError.exit_code: "failed, and the last line says why",
    **{kind.exit_code: (kind.__doc__ or "").splitlines()[0].rstrip(".") for kind in _KINDS},
    BUG: "a bug in Wave",
    INTERRUPTED: "interrupted (Ctrl-C); what was measured is kept",
}


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    code = _explain(arguments)
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's own flush at exit stays silent
        if error.errno == errno.EPIPE:
            return PIPE_CLOSED
        return code or _say(f"standard output: {error.strerror}", WaveError.exit_code)
    return code


def _explain(arguments: Sequence[str]) -> int:
    """Run the command; what it raises becomes one line and an exit code."""
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return _say("interrupted", INTERRUPTED)
    except WaveError as error:
        _debug()
        return _say(str(error), error.exit_code)
    except BrokenPipeError:
        return PIPE_CLOSED
    except OSError as error:
        _debug()
        where = f"{error.filename}: {error.strerror}" if error.filename else f"{error.strerror or error} (WAVE_DEBUG=1 shows where)"
        return _say(where, WaveError.exit_code)
    except Exception as error:
        _debug()
        return _say(f"{_place(error)}; this is a bug in Wave, please report it (WAVE_DEBUG=1 shows where)", BUG)


def _dispatch(arguments: Sequence[str]) -> int:
    import typer

    from waveos.cli.app import app

    usage_error: Any = typer.BadParameter.__bases__[0]
    try:
        result = typer.main.get_command(app).main(list(arguments), prog_name="wave", standalone_mode=False)
    except usage_error as error:
        if not error.format_message():  # no command was named: the help is on the screen
            return ConfigError.exit_code
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "wave"
        return _say(f"{error.format_message().rstrip('.')} (see: {path} --help)", ConfigError.exit_code)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, BrokenPipeError):  # Typer's own way with it is exit code 1
            raise leaving.__context__ from None
        raise
    except typer.Abort as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        return _say("aborted", WaveError.exit_code)
    code = result if isinstance(result, int) else 0
    return _say("interrupted", code) if code == INTERRUPTED else code


def _say(line: str, code: int) -> int:
    """One line on stderr whatever the message; returns the exit code."""
    line = " ".join(line.split())
    log = sys.modules.get("waveos.log")  # of a daemon
    if log is not None and log.as_json():
        log.say("wave", line, "error" if code != INTERRUPTED else "info", exit_code=code)
    else:
        print(f"wave: {line}", file=sys.stderr)
    return code


def _place(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _debug() -> None:
    if os.environ.get("WAVE_DEBUG", "0") not in ("", "0"):
        import traceback

        traceback.print_exc()
