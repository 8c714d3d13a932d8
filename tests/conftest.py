"""Options and fixtures. README.md says what each folder proves.

`--deep` runs everything, and `--rest` what a run without it leaves out.
`--device cuda` makes the tests' tensors on a GPU unless a test says otherwise, and `--device executor` on the device of
kernels/executor_device/: kernels/test_executor_device.py starts what runs on it.

What imports torch stands inside the functions: the process that hands out the tests to others needs none of it, and
they wait for it to start.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import selection
from compiler import ROOT
from filelock import FileLock

# One thread but in tests of threads, and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# What `--device cuda` leaves out: by file or folder here, by the marker below where a single test differs.
OF_THE_CPU = {
    "kernels": "runs, counts and mutates the kernels on the CPU; gpu/test_gpu.py runs them on a GPU",
    "of_tests": "tests of the tests, which need no GPU",
    "test_demo.py": "the demo trains on the CPU",
    "test_threads.py": "about threads of the CPU",
    "test_expression.py": "expressions as C++ for the CPU; gpu/test_gpu.py runs losses of one's own",
}
LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests make their tensors: cpu, cuda or executor")
    parser.addoption("--deep", action="store_true", help="everything: full grids, mutants, sanitizers, 2,000 examples")
    parser.addoption("--rest", action="store_true", help="what --deep adds to a run without it")
    parser.addoption("--part", default="1/1", help="k/n: the k-th of n parts of the tests")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "on_cpu_alone(reason): left out with --device cuda")
    config.addinivalue_line("markers", "hardware(reason): left out with --device executor")
    config.addinivalue_line("markers", "deep(kind, minutes=0): for --deep and --rest alone")
    config.addinivalue_line("markers", "thinned(n=2, deep=0): cases with all of any n values, `deep` with --deep")
    config.addinivalue_line("markers", "examples: random calls, fewer without --deep")
    for profile, examples in (("default", 100), ("thorough", 2000)):
        options = {"derandomize": True, "deadline": None, "database": None}
        hypothesis.settings.register_profile(profile, max_examples=examples, **options)
    hypothesis.settings.load_profile("thorough" if _wanted(config) != "default" else "default")
    if _on_executor(config):
        import executor_device

        if executor_device.VARIABLE not in os.environ:
            raise pytest.UsageError(f"--device executor needs {executor_device.VARIABLE}, the library built for it")
        executor_device.load(Path(os.environ[executor_device.VARIABLE]))
    if _on_gpu(config):
        from losses import ON_GPU

        if not ON_GPU:
            raise pytest.UsageError("--device cuda needs a GPU and an extension built with its CUDA kernels")
    config.stash[LEFT_OUT] = Counter()


def _wanted(config: pytest.Config) -> str:
    return "rest" if config.getoption("--rest") else "deep" if config.getoption("--deep") else "default"


def _on_gpu(config: pytest.Config) -> bool:
    return not config.getoption("--device").startswith("cpu")


def _on_executor(config: pytest.Config) -> bool:
    return config.getoption("--device").startswith("executor")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A test that is named runs.
    if not any("::" in argument for argument in config.args):
        kept, config.stash[LEFT_OUT] = selection.selected(items, _wanted(config))
        kept = selection.part_of(kept, config.getoption("--part"))
        config.hook.pytest_deselected(items=list(set(items).difference(kept)))
        items[:] = sorted(kept, key=selection.minutes, reverse=True)
    if not _on_gpu(config):
        return
    from marks import UNDER_A_MODE

    for item in items:
        reasons = [OF_THE_CPU[part] for part in item.path.parts if part in OF_THE_CPU]
        reasons += [mark.kwargs["reason"] for mark in item.iter_markers("on_cpu_alone")]
        if _on_executor(config):
            reasons += [mark.kwargs["reason"] for mark in item.iter_markers("hardware")]
        if "weight" in item.name and re.search(r"(?<!smooth[_ ])l1", item.name):
            reasons.append(UNDER_A_MODE)
        if reasons:
            item.add_marker(pytest.mark.skip(reason=reasons[0]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist says what it left out, because the process that reports collects nothing itself."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """The process that reports hears of it; each worker leaves out the same."""
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash[LEFT_OUT]
    if left_out and _wanted(config) == "default":
        terminalreporter.write_line("`make test-all` (pytest --deep) adds:")
        for kind, count in left_out.most_common():
            terminalreporter.write_line(f"  {count:5}  {kind}")


# ---- fixtures


@pytest.fixture(scope="session")
def once() -> Callable[[str, Callable[[Path], None]], Path]:
    """`once(name, make)`: a folder that `make` filled, in this run or an earlier one; other workers wait for it.

    The name must change with everything that `make` reads: compiler.fingerprint().
    """

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        made = ROOT / "build" / "tests" / name
        made.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(made.with_suffix(".lock")):
            if not (made / "complete").exists():
                made.mkdir(exist_ok=True)
                make(made)
                (made / "complete").touch()
        return made

    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _extensions() -> Iterator[None]:
    """Losses of one's own are compiled here, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(ROOT / "build" / "tests" / "extensions"))
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch's threads, until the test ends."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """For tests, not for doctests, whose text names no device."""
    device = request.config.getoption("--device")
    if device == "cpu" or isinstance(request.node, pytest.DoctestItem):
        yield
        return
    import torch

    torch.set_default_device(device)
    yield
    torch.set_default_device(None)
    torch.get_device_module(device).synchronize()  # which raises what the test left undone


@pytest.fixture(autouse=True)
def _doctest_namespace(doctest_namespace: dict[str, object]) -> None:
    import torch

    import fusedloss

    doctest_namespace.update(torch=torch, fusedloss=fusedloss)
