"""Output files: a file is there whole or not at all.

What is written goes to a temporary file in the same folder, is synced to the disk, and takes the name in one step. A full
disk, a limit or a Ctrl-C half way leaves what was there before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from waveos.errors import ConfigError

_ADVICE = {
    errno.ENOSPC: "free some space there, or name a file on another disk",
    errno.EDQUOT: "free some of your quota there, or name a file on another disk",
    errno.EFBIG: "raise the limit on file size (ulimit -f), or name a file on another disk",
    errno.ENOENT: "make the folder first, or name a file in one that exists",
    errno.ENOTDIR: "name a file in a folder that exists",
    errno.EISDIR: "name a file, not a folder",
    errno.EACCES: "name a file where you may write",
    errno.EPERM: "name a file where you may write",
    errno.EROFS: "name a file on a disk that is not read-only",
    errno.ENAMETOOLONG: "name a shorter file",
}


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all. Raises ConfigError, which names the file, what happened and what to do."""
    with replace_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write to, which becomes `path` when the block ends, and leaves nothing when the block raises.

    A device, pipe or terminal (/dev/stdout) is written to directly: there is nothing to replace. A link is followed. Raises
    ConfigError as `write_file`.
    """
    target = Path(os.path.realpath(path))
    temporary: str | None = None
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if target.exists() and not target.is_file():
            with open(target, "wb") as file:
                yield file
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", suffix=".part", dir=target.parent)
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(handle, _mode_of(target))
            os.fsync(handle)
        os.replace(temporary, target)
        temporary = None
        _sync_folder(target.parent)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith((str(target), str(target.parent / f".{target.name[:100]}."))):
            raise  # some other file, that the block was reading
        raise ConfigError(explain_failure(path, error)) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder for output, with its parents, if it is not there. Raises ConfigError as `write_file`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(explain_failure(path, error)) from error
    return Path(path)


def explain_failure(path: str | os.PathLike[str], error: OSError) -> str:
    """One line on a file that could not be written: what happened, and what to do."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "name another file")
    return f"cannot write {os.fspath(path)}: {reason[:1].lower() + reason[1:]}; nothing was written there; {advice}"


def _mode_of(target: Path) -> int:
    """Permissions for the new file: those of the file that it replaces, else what the umask leaves."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        umask = os.umask(0)
        os.umask(umask)
        return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Make the new name durable. Some file systems cannot sync a folder: the file itself is complete, so that is not an error."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
