"""An emulated machine with another kernel and this machine's files: boot, run one command, give back what it said and its exit code.

virtme-ng builds the first file system and starts QEMU under plain emulation (no KVM). The root the command sees is this machine's, read-only
underneath, and writable on top, in the guest's memory: whatever the command does, this machine keeps its files. What comes back goes through one
shared folder, not through the console. Everything is some 10 to 20 times slower in there; no time measured inside means anything.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels import Kernel
from services import prepare

from waveos.errors import MissingError

BOOT_S = 240
"""A guest that has not begun with the command by then hangs. Alone on the machine it takes 10 s."""

# What costs an emulated kernel most and protects nothing here: memory zeroed when it is taken, copies checked, detours around faults of processors
# that are not there, five levels of pages, a clock that is watched.
_KERNEL = ("init_on_alloc=0", "hardened_usercopy=off", "mitigations=off", "apparmor=0", "nokaslr", "tsc=reliable")
_PROCESSOR = "-cpu max,la57=off,svm=off"

# All of the guest's CPUs in one thread, in turns. With a thread each, QEMU may run a breakpoint that the other CPU has already taken out of the code again
# (the kernel patches itself whenever a scheduler comes or goes): "Oops: int3" in most runs on a busy machine.
_EMULATION = "-accel tcg,thread=single"

# virtme-ng mounts the root without a cache, and its way of writing on top leaves some folders out. This mounts it again, with a cache, and all of it
# writable: Python then starts in 0.5 s instead of 5. `share` is the one folder that both sides write.
_START = """
set -e
exec >{share}/start.log 2>&1
touch {share}/begun
w=/run/wave-root
mkdir -p $w/lower $w/top $w/root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,access=any,msize=262144,cache=loose wave $w/lower
mount -t tmpfs none $w/top
mkdir $w/top/upper $w/top/work
mount -t overlay -o lowerdir=$w/lower,upperdir=$w/top/upper,workdir=$w/top/work none $w/root
mount -t bpf bpf /sys/fs/bpf || true
for folder in proc sys dev run {share}; do mount --rbind /$folder $w/root/$folder; done
set +e
chroot $w/root /bin/bash {share}/command.sh >{share}/output 2>&1
echo $? >{share}/code
dmesg >{share}/dmesg
sync
"""


_FILES = ("begun", "code", "output", "dmesg", "start.log")


@dataclass(frozen=True)
class Ended:
    """How a guest ended."""

    code: int | None  # the command's exit code; None: it did not finish
    output: str  # what the command wrote
    console: str  # what the kernel said
    boot_s: float  # from the start to the command's first step
    total_s: float

    @property
    def panicked(self) -> bool:
        return "Kernel panic" in self.console

    def __str__(self) -> str:
        if self.code is not None:
            return f"ended with code {self.code}"
        return "the kernel panicked" if self.panicked else "it was stopped, or it died" if self.boot_s else "never came up"


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    share: Path | None = None,
    cpus: int = 2,
    memory: str = "2G",
    qemu: Sequence[str] = (),
    systemd: bool = False,
) -> Ended:
    """Boot the kernel, run the command in this process's working directory, and wait for the end.

    `share`: a folder that both sides see under the same path and may write (a new one is made and deleted if None). `qemu`: further options of QEMU's.
    `systemd`: that is the first process in there, and the command a service of it (see `services`).
    Raises MissingError if a tool is not installed.
    """
    _check_tools()
    with contextlib.ExitStack() as stack:
        if share is None:
            share = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wave-guest-")))
        for name in _FILES:
            (share / name).unlink(missing_ok=True)
        return _boot(kernel, command, timeout_s, dict(environment or {}), share, cpus, memory, qemu, systemd)


def _check_tools() -> None:
    for tool, package in {
        "qemu-system-x86_64": "qemu-system-x86",
        "busybox": "busybox-static",
        "cpio": "cpio",
        "modprobe": "kmod",
        "udevadm": "udev",
    }.items():
        if not shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin"):
            raise MissingError(f"{tool} is not here, and guests need it: apt-get install {package}, or all of them: .ci/packages guest")
    if not _vng().exists():
        raise MissingError(f"{_vng()} is not here: pip install virtme-ng (it is in the extra [dev])")


def _vng() -> Path:
    return Path(sys.executable).with_name("vng")


def _boot(
    kernel: Kernel,
    command: Sequence[str],
    timeout_s: float,
    environment: dict[str, str],
    share: Path,
    cpus: int,
    memory: str,
    qemu: Sequence[str],
    systemd: bool,
) -> Ended:
    (share / "start.sh").write_text(_START.format(share=share))
    exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in _inherited(environment).items())
    (share / "command.sh").write_text(f"{exports}cd {shlex.quote(os.getcwd())}\nexec {shlex.join(command)}\n")
    options = f"-nodefaults {_EMULATION} {_PROCESSOR} -virtfs local,path=/,mount_tag=wave,security_model=none,readonly=on,multidevs=remap"
    call = [str(_vng()), "--verbose", "--disable-kvm", "--force-9p", "--run", str(kernel.image), "--cpus", str(cpus), "--memory", memory]
    call += ["--name", f"wave-guest-{os.getpid()}", f"--rwdir={share}", *(f"--append={option}" for option in _KERNEL)]
    if systemd:
        program, more = prepare(share, kernel.image)
        call += ["--qemu", str(program)]
        qemu = [more, *qemu]
    call += [f"--qemu-opts={' '.join([options, *qemu])}", "--", f"bash {share}/start.sh"]
    begun, console, start = 0.0, [], time.monotonic()
    with _started(call, share) as terminal:
        while True:
            text = _read(terminal)
            if text is None:
                break
            console.append(text)
            passed = time.monotonic() - start
            if not begun and (share / "begun").exists():
                begun = passed
            if passed > (begun + timeout_s if begun else BOOT_S):
                break
    code = (share / "code").read_text().strip() if (share / "code").exists() else ""
    said = (share / "output").read_text(errors="replace") if (share / "output").exists() else ""
    return Ended(int(code) if code else None, said, "".join(console).replace("\r\n", "\n"), begun, time.monotonic() - start)


def _inherited(environment: dict[str, str]) -> dict[str, str]:
    """What the command's programs need of this process's surroundings: the same tools, the same cache."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "XDG_CACHE_HOME", "CI", "NO_COLOR") if name in os.environ}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1", **environment}


@contextlib.contextmanager
def _started(call: list[str], share: Path) -> Iterator[int]:
    """virtme-ng in a session of its own, on a terminal of its own, which it insists on; at the end nothing of it runs or lies about."""
    ours, theirs = pty.openpty()
    scratch = share / "scratch"
    scratch.mkdir(exist_ok=True)
    surroundings = {**os.environ, "TMPDIR": str(scratch), "PATH": f"{_vng().parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    process = subprocess.Popen(
        call, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=_hang_up_with_us, env=surroundings
    )
    os.close(theirs)
    try:
        yield ours
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _let_go(ours)
        os.close(ours)
        shutil.rmtree(scratch, ignore_errors=True)


def _hang_up_with_us() -> None:
    """Make the terminal that of the session: if this process dies, however it dies, the kernel hangs up on QEMU, which then ends."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _let_go(terminal: int) -> None:
    """Wait until the last of the session has closed the terminal: they were all killed, but only the first is our child and can be waited for."""
    deadline = time.monotonic() + 10
    while _read(terminal) is not None and time.monotonic() < deadline:
        pass


def _read(terminal: int) -> str | None:
    """What came within a second; None: they have all closed it."""
    if not select.select([terminal], [], [], 1.0)[0]:
        return ""
    try:
        return os.read(terminal, 65536).decode(errors="replace") or None
    except OSError:  # EIO: no process has the other end
        return None


if __name__ == "__main__":  # python tests/vm/machine.py SERIES COMMAND ...: to look around by hand
    from kernels import kernel

    ended = run(kernel(sys.argv[1]), sys.argv[2:], timeout_s=600)
    print(ended.output, end="")
    print(f"{ended}, booted in {ended.boot_s:.0f} s, {ended.total_s:.0f} s in all", file=sys.stderr)
    if ended.code is None:
        print(ended.console[-3000:], file=sys.stderr)
    sys.exit(ended.code if ended.code is not None else 1)
