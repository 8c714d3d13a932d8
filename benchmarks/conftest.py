"""Options, the measurement of each case, and the closing tables."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedloss._library import extension, why_native

from . import compiling, terminal
from .case import Case
from .cases import cpu_cases, cpu_sweeps
from .measure import measure
from .results import Row
from .timing_cpu import clock

MEASURED = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedloss")
    group.addoption("--threads", type=int, default=2, help="threads torch may use (default: 2)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time")
    group.addoption("--enforce", action="store_true", help="fail where a goal is not met")
    group.addoption("--slow", action="store_true", help="also calls of seconds, and more small sizes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = []


def pytest_report_header(config: pytest.Config) -> str:
    load = f", load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}{load}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measured" in metafunc.fixturenames:
        cases = (*cpu_cases(quick=not metafunc.config.getoption("--slow")), *cpu_sweeps())
        metafunc.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable[[Case], Row]:
    """Measures a case. What torch.compile has to do for all of them is done before the first."""
    config = request.config
    if extension is None:
        pytest.exit(f"there is nothing to measure without fusedloss's extension: {why_native}", returncode=1)
    compile, threads = not config.getoption("--no-compile"), config.getoption("--threads")
    if compile:
        chosen: list[Any] = [item for item in request.session.items if "measured" in getattr(item, "fixturenames", ())]
        compiling.ahead([item.callspec.params["case"] for item in chosen], [threads])

    def once(case: Case) -> Row:
        ((row, *_),) = measure(case, clock, compile, threads=[threads])
        config.stash[MEASURED].append(row)
        return row

    return once


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash[MEASURED]:
        terminalreporter.write_line(terminal.whole([(row, config.getoption("--threads")) for row in rows]))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A run of which every test was skipped has measured nothing."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and not session.config.option.collectonly and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
