"""Libraries in the extension cache: a killed build and a damaged file harm no later call."""

import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fusedloss.custom import _cache
from fusedloss.custom._cache import cached

CONTENT = b"a library" * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "custom_loss_0" / "custom_loss_0.so"


class Build:
    """Writes a library, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, folder: Path) -> Path:
        self.count += 1
        made = folder / "made.so"
        made.write_bytes(CONTENT)
        return made


def test_it_is_built_once(path):
    build = Build()
    for _ in range(3):
        assert cached(path, "loss", build) == path and path.read_bytes() == CONTENT
    assert build.count == 1
    assert sorted(each.name for each in path.parent.iterdir()) == ["custom_loss_0.sha256", "custom_loss_0.so", "lock"]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(CONTENT[:5000]),
    "empty": lambda path: path.write_bytes(b""),
    "overwritten": lambda path: path.write_bytes(CONTENT[::-1]),
    "without its hash": lambda path: path.with_suffix(".sha256").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_anew(path, damage):
    cached(path, "loss", Build())
    DAMAGES[damage](path)
    build = Build()
    with pytest.warns(UserWarning, match=r"loss: .*custom_loss_0\.so is damaged and is built anew"):
        cached(path, "loss", build)
    assert build.count == 1 and path.read_bytes() == CONTENT
    cached(path, "loss", build)
    assert build.count == 1


def test_a_build_that_fails_leaves_nothing(path):
    def fails(folder: Path) -> Path:
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("does not compile")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not compile"):
            cached(path, "loss", fails)
    assert [each.name for each in path.parent.iterdir()] == ["lock"]
    cached(path, "loss", Build())


# Without torch, which takes seconds to import.
KILLED = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
def build(folder):
    (folder / "made.so").write_bytes(b"half")
    print("builds", flush=True)
    sys.stdin.read()
cache.cached(pathlib.Path(sys.argv[2]), "loss", build)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no signals; test_a_build_that_fails_leaves_nothing runs")
def test_a_killed_build_is_noticed_and_taken_over(path):
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED, _cache.__file__, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert killed.stdout is not None and killed.stdout.readline() == b"builds\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not path.exists() and (path.parent / "lock").exists()
    build = Build()
    with pytest.warns(UserWarning, match="loss: a build was killed and has left .*build-.*; it is built anew"):
        cached(path, "loss", build)
    assert build.count == 1 and not list(path.parent.glob("build-*"))


def test_of_two_at_the_same_time_one_builds_and_the_other_waits(path):
    begun, go_on, build = threading.Event(), threading.Event(), Build()

    def slow(folder: Path) -> Path:
        begun.set()
        assert go_on.wait(60)
        return build(folder)

    def refused(folder: Path) -> Path:
        raise AssertionError("builds too")

    done: list[Path] = []
    first = threading.Thread(target=lambda: done.append(cached(path, "loss", slow)))
    second = threading.Thread(target=lambda: done.append(cached(path, "loss", refused)))
    first.start()
    assert begun.wait(60)
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert done == [path, path]
