"""Compiled losses in torch's extension cache: a build that is killed, or a file that is damaged, harms no later call.

A build runs in a folder of its own and its library moves to its place in one step. Beside the library lies the hash of
its content; a library without its hash is built anew, because loading a truncated one ends the process.
"""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_BUILD = "build-"  # then a name of its own


def cached(path: Path, name: str, build: Callable[[Path], Path]) -> Path:
    """``path``, which ``build(folder)`` makes where it is missing or damaged; ``name`` is for warnings.

    Of several processes that need it at the same time one builds and the others wait.
    """
    if _is_whole(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / "lock"):
        if _is_whole(path):
            return path
        if path.exists():
            warnings.warn(f"{name}: {path} is damaged and is built anew", stacklevel=6)
        for left in path.parent.glob(f"{_BUILD}*"):  # whoever builds here holds the lock, until it ends or is killed
            warnings.warn(f"{name}: a build was killed and has left {left}; it is built anew", stacklevel=6)
            shutil.rmtree(left, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=_BUILD, dir=path.parent))
        try:
            made = build(folder)
            digest = _digest(made)
            os.replace(made, path)
            note = folder / "hash"
            note.write_text(digest)
            os.replace(note, _hash_of(path))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return path


def _hash_of(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_whole(path: Path) -> bool:
    try:
        return _hash_of(path).read_text() == _digest(path)
    except OSError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that the system takes back from a process that is gone, so that none is left behind."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes then build the same library, each in its own folder
        yield
        return
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
