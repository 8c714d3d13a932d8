"""The drivers of the CPU kernels under an emulator of another processor, called as a library of this one's."""

import ctypes
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compiler import CSRC
from torch import Tensor

HERE = Path(__file__).parent
# {driver: its functions}
DRIVERS = {
    "pointwise": ("run_pointwise", "run_indexed"),
    "softmax": ("run_softmax",),
    "row_sums": ("run_row_sums",),
    "distillation": ("run_distillation",),
}


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor lies, as a driver takes it, which also knows how much lies there."""
    address = ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
    address.tensor = tensor  # type: ignore[attr-defined]
    return address


def pointers(tensors: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    """As many as a loss of row sums has operands at most; those behind the tensors are null."""
    some = (ctypes.c_void_p * 3)(*(tensor.data_ptr() for tensor in tensors))
    some.tensors = tensors  # type: ignore[attr-defined]
    return some


def command(compiler: Sequence[str], driver: str, program: Path, csrc: Path = CSRC) -> list[str]:
    """What makes a program of a driver: a static one, as the emulator's machine has no libraries."""
    functions = " ".join(f"CALL({name})" for name in DRIVERS[driver])
    macros = [f'-DDRIVER="{driver}_driver.cpp"', f"-DFUNCTIONS={functions}"]
    source = HERE / "emulated_driver.cpp"
    return [*compiler, "-static", *macros, f"-I{csrc}", f"-I{HERE}", str(source), "-o", str(program)]


class Emulated:
    """A driver's program. Its methods are the driver's functions, which take what ctypes would give them.

    A call of the loss with number 0, as of a library that has one loss alone, is one of the loss ``number``.
    """

    def __init__(self, emulator: str, program: Path, number: int = 0) -> None:
        self.process = subprocess.Popen([emulator, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number = number

    def __enter__(self) -> "Emulated":
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.communicate()

    def __getattr__(self, function: str) -> Any:
        def call(*arguments: Any) -> float:
            if self.number:
                arguments = self.number, *arguments[1:]
            memory = [each for argument in arguments for each in _memory(argument)]
            assert self.process.stdin and self.process.stdout
            self.process.stdin.write(struct.pack("32s", function.encode()) + b"".join(map(_sent, arguments)))
            self.process.stdin.flush()
            (result,) = struct.unpack("d", self._read(8))
            for address, size in memory:
                ctypes.memmove(address, self._read(size), size)
            return float(result)

        return call

    def _read(self, count: int) -> bytes:
        assert self.process.stdout
        made = self.process.stdout.read(count)
        assert len(made) == count, f"the program ended with {self.process.wait()} in place of {count} bytes"
        return made


def _of_tensor(tensor: Tensor | None) -> tuple[int, int] | None:
    """Address and bytes, up to the end of its storage."""
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()


def _all_memory(argument: Any) -> list[tuple[int, int] | None]:
    if isinstance(argument, ctypes.c_void_p):
        return [_of_tensor(argument.tensor)]  # type: ignore[attr-defined]
    if hasattr(argument, "tensors"):
        return [_of_tensor(each) for each in (*argument.tensors, None, None)[:3]]
    if isinstance(argument, ctypes.Array):
        return [(ctypes.addressof(argument), ctypes.sizeof(argument))]
    return [None] if argument is None else []


def _memory(argument: Any) -> Iterator[tuple[int, int]]:
    return (each for each in _all_memory(argument) if each is not None)


def _sent(argument: Any) -> bytes:
    """As the program's read_argument reads it; integers as C's int, but what ctypes names."""
    if isinstance(argument, int):
        return struct.pack("i", argument)
    if isinstance(argument, ctypes.c_int64 | ctypes.c_double):
        return bytes(argument)
    blocks = (
        struct.pack("q", -1) if each is None else struct.pack("q", each[1]) + ctypes.string_at(*each)
        for each in _all_memory(argument)
    )
    count = struct.pack("q", 3) if hasattr(argument, "tensors") else b""
    return count + b"".join(blocks)


Kernels = ctypes.CDLL | Emulated
