"""Options, the measurements shared by the tests, and the closing table."""

import os
from collections.abc import Callable
from functools import lru_cache

import pytest
import report
import torch
from case import Case
from cases import CASES
from measure import Measured, Result, measure, providers

from fusedloss._library import extension

RESULTS = pytest.StashKey[dict[str, Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusedloss")
    group.addoption("--threads", type=int, default=2, help="threads torch may use (default: 2)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out, which takes most of the time")
    group.addoption("--enforce", action="store_true", help="fail where a goal is not met")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}
    if not config.getoption("benchmark_columns"):
        config.option.benchmark_columns = ["min", "median", "iqr", "rounds"]


def pytest_report_header(config: pytest.Config) -> str:
    load = f", load {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}{load}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        compile = not metafunc.config.getoption("--no-compile")
        pairs = [(case, provider) for case in CASES for provider in providers(case, compile)]
        names = [f"{case.name}-{provider}" for case, provider in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=names)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config) -> Callable[[Case], Measured]:
    """Measures a case at its first test; keeps the tensors of the latest case only, up to 131 MB."""
    if extension is None:
        pytest.skip("fusedloss runs without its extension here: there is nothing to measure")
    torch.set_num_threads(pytestconfig.getoption("--threads"))

    @lru_cache(maxsize=1)
    def once(case: Case) -> Measured:
        measured = measure(case, not pytestconfig.getoption("--no-compile"))
        pytestconfig.stash[RESULTS][case.name] = measured.result
        return measured

    return once


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[RESULTS]
    if results:
        terminalreporter.section(f"forward + backward, {config.getoption('--threads')} threads")
        for line in report.lines(results.values()):
            terminalreporter.write_line(line)
