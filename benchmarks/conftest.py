"""Options, the measurements shared by the tests, and the closing table."""

import os
from collections.abc import Callable

import pytest
import torch

from fusedloss._library import extension, why_native

from .case import Case
from .cases import cpu_cases
from .measure import measure
from .results import Row, Times
from .table import BUSY, tables
from .timing_cpu import clock

Measured = tuple[Row, Times]
MEASURED = pytest.StashKey[dict[str, Measured]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedloss")
    group.addoption("--threads", type=int, default=2, help="threads torch may use (default: 2)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time")
    group.addoption("--enforce", action="store_true", help="fail where a goal is not met")
    group.addoption("--slow", action="store_true", help="also the linear losses that take seconds a call")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[MEASURED] = {}
    if not config.getoption("benchmark_columns"):
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def pytest_report_header(config: pytest.Config) -> str:
    load = f", load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}{load}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        compile = not metafunc.config.getoption("--no-compile")
        cases = cpu_cases(quick=not metafunc.config.getoption("--slow"))
        pairs = [(case, provider) for case in cases for provider in case.providers(compile)]
        names = [f"{case.name}-{provider}" for case, provider in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=names)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[[Case], Measured]:
    """Measures a case, with all its providers, at its first test."""
    if extension is None:
        pytest.exit(f"there is nothing to measure without fusedloss's extension: {why_native}", returncode=1)
    torch.set_num_threads(pytestconfig.getoption("--threads"))
    found = pytestconfig.stash[MEASURED]

    def once(case: Case) -> Measured:
        if case.name not in found:
            (found[case.name],) = measure(case, clock, not pytestconfig.getoption("--no-compile"))
        return found[case.name]

    return once


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = [row for row, _ in config.stash[MEASURED].values()]
    if rows:
        terminalreporter.section(f"forward + backward, {config.getoption('--threads')} threads")
        terminalreporter.write_line(tables(rows, None))
        if not all(row.quiet for row in rows):
            terminalreporter.write_line(BUSY)
