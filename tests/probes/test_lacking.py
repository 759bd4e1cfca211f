"""Where probes cannot run they say why in one line, and start nothing."""

from __future__ import annotations

import os
import sys

import pytest

from waveos.cli import run
from waveos.errors import MissingError, WaveError
from waveos.host.probes import Probe, probe


@pytest.fixture
def as_if_all_were_here(monkeypatch):
    """Root, and headers that are named by bcc's own variable."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/nonexistent")


def told(capsys):
    assert run(["probe", "runqlat"]) == MissingError.exit_code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("wave: ") and said.err.count("\n") == 1
    return said.err


def test_without_root(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "need root" in told(capsys)


def test_without_bcc(monkeypatch, capsys, as_if_all_were_here):
    monkeypatch.setattr(probe, "PYTHON", sys.executable)  # a virtual environment, which has no bcc
    assert "apt-get install python3-bpfcc" in told(capsys)


def test_without_the_systems_python(monkeypatch, capsys, as_if_all_were_here):
    monkeypatch.setattr(probe, "PYTHON", "/nonexistent/python3")
    assert "/nonexistent/python3" in told(capsys)


def test_without_headers(monkeypatch, capsys, tmp_path, as_if_all_were_here):
    monkeypatch.delenv("BCC_KERNEL_SOURCE")
    monkeypatch.setattr(probe.headers.platform, "release", lambda: "0.0-none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "wave probe headers --fetch" in told(capsys)


def test_a_probe_that_was_not_started_cannot_be_read():
    with pytest.raises(WaveError, match="is not attached; start it first"):
        Probe("switches").read()
