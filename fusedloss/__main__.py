"""``python -m fusedloss``: what is installed, which path runs here, and every loss checked against native PyTorch."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

import fusedloss

from . import functional, pointwise, softmax
from ._library import extension, why_native

# Relative to the largest value or gradient; about three rounding steps of each dtype.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}

Loss = Callable[..., Tensor]


def checks() -> dict[str, tuple[Loss, Loss, Tensor, Tensor]]:
    """For each loss the function, its native formula, and an input and a target in float64."""
    torch.manual_seed(0)
    values = 4 * torch.randn(257, 33, dtype=torch.float64)
    index = torch.randint(33, (257,))
    index[::7] = -100
    return {
        "cross_entropy": (
            lambda x, y: functional.cross_entropy(x, y),
            lambda x, y: softmax._cross_entropy.native(x, y, None, "mean", -100),  # type: ignore[attr-defined]
            values,
            index,
        ),
        "focal_loss": (
            lambda x, y: functional.focal_loss(x, y, gamma=1.5),
            lambda x, y: softmax._focal.native(x, y, None, "mean", -100, 1.0, 1.5),  # type: ignore[attr-defined]
            values,
            index,
        ),
        "huber_loss": (
            lambda x, y: functional.huber_loss(x, y, delta=0.7),
            lambda x, y: pointwise._huber.native(x, y, None, "mean", 0.7),  # type: ignore[attr-defined]
            values,
            torch.randn(257, 33, dtype=torch.float64),
        ),
        "sigmoid_focal_loss": (
            lambda x, y: functional.sigmoid_focal_loss(x, y, reduction="mean"),
            lambda x, y: pointwise._sigmoid_focal.native(x, y, None, "mean", 0.25, 2.0),  # type: ignore[attr-defined]
            values,
            torch.rand(257, 33, dtype=torch.float64).round(),
        ),
    }


def error(loss: Loss, native: Loss, input: Tensor, target: Tensor, dtype: torch.dtype) -> float:
    """The largest error of value and gradient, relative to the largest exact one."""
    x = input.to(dtype).requires_grad_()
    t = target.to(dtype) if target.is_floating_point() else target
    exact_x = x.detach().double().requires_grad_()
    exact_t = t.double() if t.is_floating_point() else t
    value, exact = loss(x, t), native(exact_x, exact_t)
    (grad,) = torch.autograd.grad(value, x)
    (exact_grad,) = torch.autograd.grad(exact, exact_x)
    pairs = [(value.detach(), exact.detach()), (grad, exact_grad)]
    return max(((got.double() - want).abs().max() / want.abs().max()).item() for got, want in pairs)


def main() -> int:
    print(f"fusedloss {fusedloss.__version__}, torch {torch.__version__}")
    if extension is None:
        print(f"path:  native PyTorch ({why_native})")
    else:
        print(f"built: {extension.compiler}, for torch {extension.torch_version}")
        print(f"       instruction sets {extension.cpu_isas}; CUDA architectures {extension.cuda_architectures}")
        print(
            f"path:  fused on the CPU with {extension.cpu_isa()}, {torch.get_num_threads()} threads; native elsewhere"
        )
    failures = 0
    print("\nlargest relative error of value and gradient against native float64")
    for name, (loss, native, input, target) in checks().items():
        errors = {dtype: error(loss, native, input, target, dtype) for dtype in TOLERANCES}
        good = all(errors[dtype] <= limit for dtype, limit in TOLERANCES.items())
        failures += not good
        columns = "  ".join(f"{str(dtype).removeprefix('torch.')} {value:.1e}" for dtype, value in errors.items())
        print(f"  {name:20s} {columns}  {'ok' if good else 'OFF'}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
