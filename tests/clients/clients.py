"""Code of other packages, as their users call it."""

import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedloss


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"{', '.join(missing)} not installed: make test-all does that, into .venv"
    )


def losses_of_timm() -> Any:
    """timm's own files, without its ``__init__``: that imports torchvision, which no CPU build of torch loads."""
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        assert spec is not None
        timm = types.ModuleType("timm")
        timm.__path__ = list(spec.submodule_search_locations or [])
        sys.modules["timm"] = timm
    return importlib.import_module("timm.loss")


def value_and_grad(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    value = call(leaf)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaf)]


def same_when_patched(
    package: str, place: str, call: Callable[[Tensor], Tensor], x: Tensor, path: str = "fused"
) -> None:
    """The numbers and dtypes of the original, by that path."""
    expected = value_and_grad(call, x)
    with fusedloss.patch(package) as patched:
        got = value_and_grad(call, x)
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(x.dtype)
    torch.testing.assert_close(got, expected, rtol=rounding, atol=rounding)
    fused, native, _ = patched.report().calls[place]
    assert (fused, native) == ((1, 0) if path == "fused" else (0, 1)), patched.report()
    torch.testing.assert_close(value_and_grad(call, x), expected, rtol=0, atol=0)
