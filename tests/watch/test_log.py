"""What daemons say: a line for people, JSON for machines, and which of the two when."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from waveos import log
from waveos.cli import run
from waveos.errors import ConfigError, MissingError


@pytest.fixture(autouse=True)
def _human_again():
    yield
    log.choose("human")


SAY = "from waveos import log; log.choose({mode!r}); log.say('hostd', 'its agent ended', 'warning', enclave='demo', status=1, more=None)"


def told(mode: str, journal: bool = False, **environment: str) -> str:
    """What a process says on a pipe that is, or is not, the journal's."""
    into, out = os.pipe()
    about = os.fstat(out)
    if journal:
        environment["JOURNAL_STREAM"] = f"{about.st_dev}:{about.st_ino}"
    command = [sys.executable, "-P", "-c", SAY.format(mode=mode)]
    try:
        subprocess.run(command, stderr=out, check=True, env={**os.environ, **environment})
    finally:
        os.close(out)
    with open(into, encoding="utf-8") as file:
        return file.read()


def test_for_people_it_is_the_daemon_the_enclave_and_the_line(capsys):
    log.choose("human")
    log.say("hostd", "its agent ended", "warning", enclave="demo", status=1)
    log.say("relay", "joined")
    assert capsys.readouterr().err == "hostd: demo: its agent ended\nrelay: joined\n"


def test_for_machines_it_is_one_object_a_line_with_the_fields_and_the_time():
    line = told("json")
    found = json.loads(line)
    assert found.pop("timestamp").endswith("Z")
    assert found == {"daemon": "hostd", "enclave": "demo", "status": 1, "event": "its agent ended", "level": "warning"}
    assert line.count("\n") == 1


def test_under_systemd_it_is_json_with_the_journals_priority():
    assert told("auto", journal=True).startswith('<4>{"')


def test_a_journal_stream_that_is_not_this_stderr_means_nothing():
    assert told("auto", JOURNAL_STREAM="1:2") == "hostd: demo: its agent ended\n"
    assert told("auto") == "hostd: demo: its agent ended\n"


def test_one_who_wants_lines_for_people_gets_them_under_systemd_too():
    assert told("human", journal=True) == "hostd: demo: its agent ended\n"


def test_structlog_is_loaded_only_for_json():
    code = "import sys; from waveos import log; log.choose('human'); log.say('hostd', 'x'); print('structlog' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_without_structlog_json_is_refused_and_the_journal_gets_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "structlog", None)
    with pytest.raises(MissingError, match="JSON logs need structlog"):
        log.choose("json")
    monkeypatch.setattr(log, "to_journal", lambda: True)
    log.choose("auto")
    log.say("hostd", "x")
    assert capsys.readouterr().err == "hostd: x\n"


def test_an_unknown_way_to_speak_is_refused(capsys):
    with pytest.raises(ConfigError, match="--log loud: there are auto, human, json"):
        log.choose("loud")
    assert run(["agentd", "shm://demo", "fifo", "--log", "loud"]) == 2
    assert "--log loud" in capsys.readouterr().err


def test_the_last_line_of_a_daemon_is_json_too():
    code = "import sys; from waveos.cli import run; sys.exit(run(['agentd', 'demo', '--log', 'json']))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    found = json.loads(done.stderr)
    assert (done.returncode, found["exit_code"], found["level"]) == (2, 2, "error") and "stands where a link was expected" in found["event"]
