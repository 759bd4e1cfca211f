"""What every command keeps to: one line an error, documented exit codes, data on stdout and talk on stderr."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

import waveos.cli
from waveos.cli import BUG, EXIT_CODES, INTERRUPTED, PIPE_CLOSED, run
from waveos.errors import ConfigError, LinkError, MissingError, PolicyError, WaveError

WAVE = [sys.executable, "-P", "-c", "from waveos.cli import main; main()"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (WaveError("it failed"), 1, "wave: it failed"),
        (ConfigError("unknown key `rate`"), 2, "wave: unknown key `rate`"),
        (PolicyError("handler raised\nin line 3"), 3, "wave: handler raised in line 3"),
        (LinkError("ring is taken"), 4, "wave: ring is taken"),
        (MissingError("no rocksdict"), 5, "wave: no rocksdict"),
        (KeyboardInterrupt(), INTERRUPTED, "wave: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "report.html"), 1, "wave: report.html: No space left on device"),
    ],
)
def test_an_error_is_one_line_on_stderr_and_its_exit_code(monkeypatch, capsys, error, code, line):
    def fail(_arguments):
        raise error

    monkeypatch.setattr(waveos.cli, "_dispatch", fail)
    assert run([]) == code
    said = capsys.readouterr()
    assert said.err == line + "\n"
    assert said.out == ""


def test_a_bug_is_told_as_one_and_without_a_traceback(monkeypatch, capsys):
    monkeypatch.delenv("WAVE_DEBUG", raising=False)
    monkeypatch.setattr("waveos.cli.doctor.examine", lambda: 1 / 0)
    assert run(["doctor"]) == BUG
    told = capsys.readouterr().err
    assert told.startswith("wave: ZeroDivisionError: division by zero (test_command.py:")
    assert "bug in Wave" in told
    assert told.count("\n") == 1


def test_wave_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("WAVE_DEBUG", "1")
    monkeypatch.setattr("waveos.cli.doctor.examine", lambda: 1 / 0)
    assert run(["doctor"]) == BUG
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_ctrl_c_inside_a_command_exits_with_130_and_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("waveos.cli.doctor.examine", interrupted)
    assert run(["doctor"]) == INTERRUPTED
    assert capsys.readouterr().err.strip() == "wave: interrupted"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["polices"], "wave: No such command 'polices'"),
        (["doctor", "--jsn"], "wave: No such option: --jsn"),
        (["policies", "show"], "wave: Missing argument"),
        (["bench", "theory", "--seed", "x"], "wave: Invalid value for '--seed'"),
    ],
)
def test_a_mistyped_command_line_is_one_line_that_names_the_help(capsys, arguments, line):
    assert run(arguments) == ConfigError.exit_code
    said = capsys.readouterr()
    assert said.err.startswith(line)
    assert "--help)" in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_nearest_command_is_named(capsys):
    assert run(["polices"]) == ConfigError.exit_code
    assert "policies" in capsys.readouterr().err


def test_help_names_every_command_and_every_exit_code(capsys):
    assert run(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for command in ("run", "compare", "sweep", "plan", "trace", "report", "config", "policies", "new", "bench", "calibrate", "doctor", "demo"):
        assert f" {command} " in text
    for code, meaning in EXIT_CODES.items():
        assert f"{code} {meaning}" in text


def test_exit_codes_of_the_error_classes_differ():
    codes = [kind.exit_code for kind in (WaveError, ConfigError, PolicyError, LinkError, MissingError)]
    assert len({*codes, 0, BUG, INTERRUPTED, PIPE_CLOSED}) == len(codes) + 4


def test_no_command_shows_the_help_and_fails(capsys):
    assert run([]) == ConfigError.exit_code
    said = capsys.readouterr()
    assert "Usage" in said.out + said.err
    assert "wave: " not in said.err


def test_the_command_line_loads_nothing_heavy_before_a_command_runs():
    heavy = ("numpy", "numba", "scipy", "pydantic", "matplotlib", "jinja2", "rocksdict")
    code = f"import sys; from waveos.cli import run; run(['--help']); sys.exit(any(m in sys.modules for m in {heavy!r}))"
    assert subprocess.run([sys.executable, "-P", "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_reader_that_goes_away_is_not_an_error_to_talk_about():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*WAVE, "doctor", "--json"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (PIPE_CLOSED, "")


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}])
@pytest.mark.parametrize("arguments", [["--version"], ["doctor", "--json"]])
def test_a_full_disk_under_stdout_is_one_line(arguments, buffering):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | buffering
    with open("/dev/full", "w") as full:
        done = subprocess.run([*WAVE, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
    assert done.returncode == WaveError.exit_code
    assert done.stderr.startswith("wave: ")
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1


def test_output_into_a_pipe_has_no_colours_and_json_is_one_document():
    plain = subprocess.run([*WAVE, "doctor"], capture_output=True, text=True, check=False)
    assert "\x1b" not in plain.stdout
    assert "numba" in plain.stdout
    document = subprocess.run([*WAVE, "doctor", "--json"], capture_output=True, text=True, check=False)
    assert {"ok", "checks"} == set(json.loads(document.stdout))
