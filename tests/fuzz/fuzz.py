"""Fuzz the decoders, guided by coverage: `python tests/fuzz/fuzz.py [TARGET ...] [--inputs N] [--seed N]`; without targets all, N inputs over them.

An input that makes a decoder fail is kept as corpus/TARGET/HASH, which the tests try again for ever.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Each target in a process of its own, as libFuzzer ends the one that it runs in."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--inputs", type=int, default=100_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args()
    sys.path.insert(0, str(HERE))
    if options.only:
        return fuzz(options.only, rest)
    from targets import TARGETS

    chosen = options.targets or list(TARGETS)
    failed = 0
    for name in chosen:
        if name not in TARGETS:
            print(f"fuzz: no target {name!r}; there are: {', '.join(TARGETS)}", file=sys.stderr)
            return 2
        begun = time.monotonic()
        runs = max(1, options.inputs // len(chosen))
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                f"-runs={runs}",
                f"-seed={options.seed}",
                "-verbosity=0",
                "-timeout=10",
                "-max_len=4096",
                f"-artifact_prefix={folder}/",
                folder,
            ]
            for number, seed in enumerate(TARGETS[name].seeds()):
                Path(folder, f"seed-{number}").write_bytes(seed)
            done = subprocess.run([sys.executable, "-P", __file__, "--only", name, *arguments], capture_output=True, text=True, env=os.environ)
            for path in [*Path(folder).glob("crash-*"), *Path(folder).glob("timeout-*")]:
                kept = HERE / "corpus" / name / hashlib.sha256(path.read_bytes()).hexdigest()[:16]
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(path.read_bytes())
                print(f"fuzz: {name}: an input of {path.stat().st_size} bytes fails; kept as {kept}", file=sys.stderr)
        if done.returncode:
            failed += 1
            print(done.stderr[-3000:], file=sys.stderr)
        print(f"{name}: {runs} inputs, {'FAILED' if done.returncode else 'no failure'}, {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if failed else 0


def fuzz(name: str, arguments: list[str]) -> int:
    """libFuzzer's loop over one target; it ends this process."""
    import atheris

    with atheris.instrument_imports(include=["waveos", "targets"]):
        from targets import run_one

    atheris.Setup([sys.argv[0], *arguments], lambda data: run_one(name, data))
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
