"""Where policies come from: the entry-point group `waveos.policies`, or a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from contextlib import redirect_stdout
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path

from waveos.errors import PolicyError
from waveos.names import nearest, split_policy_file
from waveos.policy.policy import Policy

GROUP = "waveos.policies"


def policy_names(subsystem: str = "") -> list[str]:
    """Names of all installed policies, sorted; with `subsystem`, of those of it that can be loaded."""
    names = sorted({entry.name for entry in entry_points(group=GROUP)})
    return [name for name in names if _subsystem_of(name) == subsystem] if subsystem else names


def _subsystem_of(name: str) -> str:
    try:
        return _from_entry_point(name).subsystem.__name__.rpartition(".")[2]
    except PolicyError:
        return ""


def load_policy(name: str) -> type[Policy]:
    """The policy called `name`: an installed one, `path/to/file.py`, or `path/to/file.py:Class`. Raises PolicyError with what is there instead."""
    if (file := split_policy_file(name)) is not None:
        return _from_file(*file)
    return _from_entry_point(name)


@lru_cache(maxsize=64)
def _from_entry_point(name: str) -> type[Policy]:
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            try:
                found = entry.load()
            except PolicyError:
                raise
            except Exception as error:
                raise PolicyError(f"policy {name!r} ({entry.value}) cannot be loaded: {type(error).__name__}: {error}") from error
            if not (isinstance(found, type) and issubclass(found, Policy)):
                raise PolicyError(f"entry point {name!r} names {entry.value}, which is not a Policy class")
            return found
    raise PolicyError(f"no policy {name!r}{nearest(name, policy_names())}; installed: {', '.join(policy_names())}; or give a file: ./{name}.py")


def _from_file(file: str, wanted: str) -> type[Policy]:
    path = Path(file).expanduser().resolve()
    if not path.is_file():
        raise PolicyError(f"no policy file {path}")
    spec = importlib.util.spec_from_file_location(f"wave_policy_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with redirect_stdout(sys.stderr):  # what the file prints is talk, not data
            spec.loader.exec_module(module)
    except PolicyError:
        raise
    except SyntaxError as error:
        raise PolicyError(f"{path}:{error.lineno}: {error.msg}") from error
    except SystemExit as error:
        raise PolicyError(f"{_place(path, error)}: the file ends the program (SystemExit); it may only define policies") from error
    except Exception as error:
        raise PolicyError(f"{_place(path, error)}: {_misspelt_keyword(error) or f'{type(error).__name__}: {error}'}") from error
    classes = {v.__name__: v for v in vars(module).values() if isinstance(v, type) and issubclass(v, Policy) and v.__module__ == spec.name}
    if wanted:
        if wanted not in classes:
            raise PolicyError(f"{path} has no policy class {wanted!r}{nearest(wanted, classes)}; it has: {', '.join(classes) or 'none'}")
        return classes[wanted]
    if not classes:
        raise PolicyError(f"{path} has no policy class; write one as class Mine(Policy, subsystem=sched, name='mine')")
    if len(classes) != 1:
        raise PolicyError(f"{path} has {len(classes)} policy classes ({', '.join(classes)}); name one as {path.name}:Class")
    return next(iter(classes.values()))


def _place(path: Path, error: BaseException) -> str:
    """file:line of what the file did when it raised."""
    line = next((frame.lineno for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename == str(path)), None)
    return f"{path}:{line}" if line else str(path)


def _misspelt_keyword(error: Exception) -> str:
    """Of a class statement with a keyword that `Policy` does not know: that, and the nearest it knows."""
    found = re.search(r"Policy\.__init_subclass__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found:
        return ""
    known = [each.name for each in inspect.signature(Policy.__init_subclass__).parameters.values() if each.kind is each.KEYWORD_ONLY]
    return f"a policy class takes no keyword {found[1]!r}{nearest(found[1], known)}; known: {', '.join(known)}"
