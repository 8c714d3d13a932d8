"""The calls that the tests of the sigmoid focal loss over class indices run over."""

import torch
import torch.nn.functional as F
from losses import NATIVE, extension, kernel
from torch import Tensor

import fusedloss.functional as L

PARAMS = [(0.25, 2.0), (-1.0, 0.5), (0.7, 0.0)]


def FORMULA(x: Tensor, y: Tensor, weight: Tensor | None, reduction: str, ignore_index: int, *params: float) -> Tensor:
    return NATIVE["sigmoid_focal"](x, y, weight, reduction, *params, ignore_index=ignore_index)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of every kind: classes, C and a negative for the background, ignored ones over NaN."""
    device = torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    y = torch.randint(-1, shape[1] + 1, shape[:1] + shape[2:], generator=generator, device="cpu")
    y.view(-1)[2::7] = -100
    x.masked_fill_((y == -100).unsqueeze(1), float("nan"))
    return x.to(device, dtype), y.to(device)


def one_hot(y: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    named = torch.where((y >= 0) & (y < classes), y, classes)
    return F.one_hot(named, classes + 1)[..., :-1].movedim(-1, 1).to(dtype)


def loss(params=PARAMS[0], **options):
    return lambda x, y, r: L.sigmoid_focal_loss(x, y, *params, r, **options)


def exact_loss(params=PARAMS[0], weight: Tensor | None = None):
    return lambda x, y, r: FORMULA(x, y, None if weight is None else weight.double(), r, -100, *params)


def runs_fused(x: Tensor, y: Tensor, weight: Tensor | None = None, reduction: str = "mean") -> bool:
    return extension is not None and (
        kernel("sigmoid_focal")(x, y, weight, reduction, 0.25, 2.0, ignore_index=-100) is not None
    )


def weights_of(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    ones = (1,) * (len(shape) - 2)
    sizes = {
        "classes": (shape[1], *ones),
        "rows": (shape[0], 1, *shape[2:]),
        "batch": (shape[0], 1, *ones),
        "elements": shape,
        "one": (1,),
    }
    return {name: (torch.rand(size, dtype=torch.float64) + 0.5).to(dtype) for name, size in sizes.items()}
