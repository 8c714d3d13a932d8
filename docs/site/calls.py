"""Calls of the losses as they are written elsewhere: which function was called, and with what."""

import contextlib
import doctest
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import fusedloss
from fusedloss import functional
from fusedloss._library import extension

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Call(NamedTuple):
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Noted(TorchFunctionMode):
    """Notes the calls of the losses, each of which is one call to a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if getattr(functional, name, None) is func:
            self.calls.append(Call(name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def called_by(run: Callable[[], object]) -> list[Call]:
    with Noted() as noted:
        run()
    return noted.calls


def example(name: str) -> Call:
    """The first call of a loss in its docstring's example."""
    function = getattr(functional, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={**function.__globals__, "torch": torch})

    def run() -> None:
        for line in test.examples:
            exec(compile(line.source, test.name, "single"), test.globs)

    with contextlib.redirect_stdout(io.StringIO()):
        calls = called_by(run)
    return next(call for call in calls if call.name == name)


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(cast(each, dtype) for each in value)
    return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def dtypes(name: str) -> list[list[str]]:
    """Each dtype and the path of the example's call in it; nothing where the kernels are not there."""
    if extension is None:
        return []
    call, rows = example(name), []
    for dtype in DTYPES:
        arguments = cast(call.arguments, dtype)
        arguments[0].requires_grad_()
        options = {option: cast(value, dtype) for option, value in call.options.items()}
        path = fusedloss.explain(getattr(functional, name), *arguments, **options)
        rows.append([f"`{dtype}`", "fused" if path.startswith("fused") else path])
    return rows
