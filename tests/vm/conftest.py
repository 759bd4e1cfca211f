"""Tests in guest kernels: `pytest tests/vm/guest tests/host/sched tests/memory/test_live.py -k 'vm or sched_ext' --guests=6.17,7.2`: `make test-vm`.

Outside, with `--guests`, each test that was chosen stands for one run of it in each kernel: the first boots them, a guest a core, which run all tests in
there, then each reports what became of it, as if it had run here. Without the option those of the folder guest/ are skipped, with the reason. Inside,
the plugin `telling` writes them down.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 1_800
INSIDE = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "PYTHONPATH": str(HERE)}
"""What is compiled outside runs inside as well: for no processor in particular, so that it is found in the cache. And the plugin `telling` is found."""
sys.path.insert(0, str(HERE))  # tests are imported by their path, so what lies beside them has to be told where it is


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--guests", metavar="SERIES,...", help="run the chosen tests in guests with these kernels (6.17,7.2), not here")


@pytest.hookimpl(trylast=True)  # when -k has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--reports-to", None):
        return
    if series := config.getoption("--guests", None):
        runs = Guests(series.split(","), [item.nodeid for item in items], config).runs
        items[:] = [
            InGuest.from_parent(item.parent, name=f"{item.name}[{run.series}]", original=item.nodeid, run=run) for run in runs for item in items
        ]
        return
    for item in items:
        if item.path.is_relative_to(HERE / "guest"):
            item.add_marker(pytest.mark.skip(reason="wants a guest kernel with sched_ext: make test-vm"))


# ── outside ──


class Guests:
    """The guests of a session, which run at the same time: each is emulated by one thread, so it takes one of this machine's cores."""

    def __init__(self, series: list[str], tests: list[str], config: pytest.Config):
        self.runs = [Run(each, tests, config, self) for each in series]
        self._boots: dict[str, Future[Any]] = {}

    def first_boot(self, series: str) -> Any:
        """What came of all tests in the first guest of that kernel: the first arguments of `Run._take`."""
        if not self._boots:
            from kernels import kernel

            _compile()
            kernels = {run.series: kernel(run.series) for run in self.runs}
            cores = len(os.sched_getaffinity(0))
            pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _end_with_our_parent)
            self._boots = {run.series: pool.submit(_boot_for_our_parent, kernels[run.series], run.tests) for run in self.runs}
            pool.shutdown(wait=False)
        return self._boots[series].result()


def _end_with_our_parent() -> None:
    """Whatever it ends of: what runs here is told, and clears up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # not SIGINT, which who starts a program in the background has it ignore
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _boot_for_our_parent(kernel: Any, tests: list[str]) -> tuple[Any, Any, list[str]]:
    """As `boot`. If who asked for it ended meanwhile, this process ends, too, with nothing of the guest left."""
    parent = os.getppid()
    try:
        return boot(kernel, tests)
    finally:
        if os.getppid() != parent:
            os._exit(1)


def boot(kernel: Any, tests: list[str]) -> tuple[Any, Any, list[str]]:
    """Run the tests in a guest: its kernel, how it ended, and the reports, each as a line of JSON."""
    from machine import run
    from outside import joined_by_bar

    with tempfile.TemporaryDirectory(prefix="wave-guest-") as folder, joined_by_bar(any("bar" in test for test in tests)) as device:
        file, chosen = Path(folder, "reports"), Path(folder, "tests")
        chosen.write_text("\n".join(tests))
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib --strict-markers", "-q"]
        command += ["-p", "telling", f"--reports-to={file}", f"@{chosen}"]
        ended = run(kernel, command, timeout_s=TIMEOUT_S, share=Path(folder), environment=INSIDE, qemu=device)
        return kernel, ended, file.read_text().splitlines() if file.exists() else []


class Run:
    """The tests' one run in the guest of a series; a second one of those left to tell, if its kernel panicked or it never came up."""

    def __init__(self, series: str, tests: list[str], config: pytest.Config, guests: Guests):
        self.series, self.tests = series, tests
        self._config = config
        self._guests = guests
        self._reports: dict[str, list[pytest.TestReport]] | None = None
        self._ended = ""

    def reports(self, test: str) -> list[pytest.TestReport]:
        """What the test reported; a single failed one if the guest ended before it could."""
        if self._reports is None:
            self._reports = defaultdict(list)
            from waveos.errors import WaveError

            try:
                if left := self._take(*self._guests.first_boot(self.series), ""):
                    self._take(*boot(self._kernel, left), " again")
            except WaveError as error:
                pytest.exit(f"tests in guests: {error}", returncode=1)
        found = self._reports[test]
        if _whole(found):
            return found
        why, self._ended = self._ended, "as said of the first"
        return [pytest.TestReport(test, ("", None, ""), {}, "failed", f"the guest told nothing of this test: {why}", "call")]

    def _take(self, kernel: Any, ended: Any, lines: list[str], which: str) -> list[str]:
        """Keep what a guest told. The tests that are left, if the guest itself failed, and not a test in it."""
        assert self._reports is not None
        self._kernel = kernel
        told: dict[str, list[pytest.TestReport]] = defaultdict(list)
        for line in lines:
            report = self._config.hook.pytest_report_from_serializable(config=self._config, data=json.loads(line))
            if report.skipped and isinstance(report.longrepr, list):  # JSON knows no tuples, and pytest wants one here
                report.longrepr = tuple(report.longrepr)
            told[report.nodeid].append(report)
        self._reports.update(told)
        untold = [test for test in self.tests if not _whole(self._reports[test])]
        failed = bool(untold) and (ended.panicked or not ended.boot_s)
        rest = f"; {len(untold)} of {len(self.tests)} tests were not told" if untold else ""
        if failed and not which:
            rest += ", and run in another boot"
        self._say(f"{kernel.version}{which}: {ended}, {ended.total_s:.0f} s, {ended.boot_s:.0f} s of them to boot{rest}")
        said = ended.output if ended.code is not None else "\n".join([ended.output, ended.console[-4000:]])
        self._ended = f"{ended}\n{said[-8000:]}"
        return untold if failed else []

    def _say(self, line: str) -> None:
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(f"guest: {line}")


def _whole(reports: list[pytest.TestReport]) -> bool:
    """The test told its end."""
    return bool(reports) and reports[-1].when == "teardown"


def _compile() -> None:
    done = subprocess.run([sys.executable, "-P", str(HERE / "compiled.py")], env={**os.environ, **INSIDE}, capture_output=True, text=True)
    if done.returncode:
        pytest.exit(f"tests in guests: what runs in there does not compile out here:\n{done.stderr}", returncode=1)


class InGuest(pytest.Item):
    """A test that runs in there."""

    def __init__(self, *, original: str, run: Run, **kwargs: Any):
        super().__init__(**kwargs)
        self.original = original
        self.run = run

    def runtest(self) -> None:
        raise AssertionError("never called: the guest has run it")

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not isinstance(item, InGuest):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in item.run.reports(item.original):
        report.nodeid, report.location = item.nodeid, item.location
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
