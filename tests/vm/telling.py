"""A plugin of pytest's for inside a guest (`-p telling --reports-to=FILE`): each report goes to a file line by line, so that a guest that dies half way
still tells how far it came. No conftest: it is there whichever tests are chosen.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reports-to", metavar="FILE", help="in a guest: where the reports go")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Reports(config, Path(config.getoption("--reports-to"))))


class Reports:
    """Writes each report when it is made."""

    def __init__(self, config: pytest.Config, file: Path):
        self._config = config
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line = json.dumps(self._config.hook.pytest_report_to_serializable(config=self._config, report=report), default=str)
        with self._file.open("a") as reports:
            reports.write(line + "\n")
            reports.flush()
            os.fsync(reports.fileno())
