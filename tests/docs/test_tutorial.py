"""The tutorial does what it says: its files are written and its commands run, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
BLOCK = re.compile(r"(?:^`(?P<file>[\w./-]+)`:\n\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
PATIENCE_S = 300  # of one command, the compilation of the engine included


class Command(NamedTuple):
    line: str
    typed: list[str]  # into its standard input
    shown: list[str]  # of its output


def blocks():
    """(kind, name of the file, text) of every fenced block."""
    return [(found["kind"], found["file"], found["text"]) for found in BLOCK.finditer(PAGE.read_text())]


def commands(text):
    """The commands of a console block with what the page shows of their output."""
    found = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], [], []))
        elif line.startswith("(Pdb) "):
            found[-1].typed.append(line.removeprefix("(Pdb) "))
        else:
            found[-1].shown.append(line)
    return found


def words(text):
    """What must be recognised: words of two letters or more; numbers change with the model."""
    return set(re.findall(r"[A-Za-zµ_][\w.'-]*[\w']", text))


def run(command, folder):
    """Run one command as in a terminal whose PATH begins with this Python's folder."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTEST_ADDOPTS": ""}
    environment.pop("WAVE_JIT", None)
    typed = "".join(f"{line}\n" for line in command.typed)
    return subprocess.run(["bash", "-c", command.line], cwd=folder, env=environment, input=typed, capture_output=True, text=True, timeout=PATIENCE_S)


def test_every_file_and_command_of_the_tutorial_works_as_shown(tmp_path):
    ran = 0
    for kind, file, text in blocks():
        if kind == "python":
            assert file, f"a block of Python without the name of its file before it: {text[:60]!r}"
            (tmp_path / file).write_text(text)
            continue
        assert kind == "console", f"a block of kind {kind!r} that nobody runs"
        for command in commands(text):
            done = run(command, tmp_path)
            said = done.stdout + done.stderr
            fails = bool(command.typed) or any(line.startswith("wave: ") for line in command.shown)
            assert bool(done.returncode) == fails, f"$ {command.line}\nexit code {done.returncode}\n{said}"
            missing = words("\n".join(command.shown)) - words(said)
            assert not missing, f"$ {command.line}\ndoes not say {sorted(missing)}, but:\n{said}"
            ran += 1
    assert ran >= 12


def test_the_page_shows_output_for_all_but_silent_commands():
    for kind, _, text in blocks():
        if kind == "console":
            for command in commands(text):
                assert command.shown or command.line.startswith("sed "), f"nothing is shown of $ {command.line}"
