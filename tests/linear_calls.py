"""Operands of the linear losses, and the same losses of the logits, in plain float64."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from compare import upstreams
from torch import Tensor

import fusedloss.functional as L

# Relative, in the L2 norm: half types round the logits, and each gradient once more.
WITHIN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CLASSES = 11
IGNORED = -100


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    made = scale * torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return made.to(torch.get_default_device())


def operands(
    rows: Iterable[int] = (23,), dtype: torch.dtype = torch.float32, positions: Iterable[int] = (), features: int = 6,
    classes: int = CLASSES,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The hidden states, the head and its bias, which require gradients."""
    sizes = ((*rows, features), (classes, *positions, features), (classes, *positions))
    made = [drawn(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(sizes)]
    return made[0], made[1], made[2]


def indices(rows: Iterable[int] = (23,), positions: Iterable[int] = (), classes: int = CLASSES) -> Tensor:
    """Class indices, a fifth of which are ignored."""
    shape = (*rows, *positions)
    generator = torch.Generator("cpu").manual_seed(3)
    made = torch.randint(classes, shape, generator=generator, device="cpu")
    if made.numel() > 1:
        made.view(-1)[1::5] = IGNORED
    return made.to(torch.get_default_device())


def probabilities(rows: Iterable[int] = (23,), positions: Iterable[int] = (), classes: int = CLASSES) -> Tensor:
    rows = tuple(rows)
    return drawn(*rows, classes, *positions, seed=4).softmax(len(rows))


def doubled(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [each.detach().double().requires_grad_() for each in tensors]


def norm_error(got: Tensor, exact: Tensor) -> float:
    assert got.shape == exact.shape
    if not exact.numel() or not exact.any():
        return float(got.double().abs().sum())
    return float((got.double() - exact).norm() / exact.norm())


def logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, logit_scale: Any = 1.0) -> Tensor:
    """(N, C) or (N, C, K), from any number of leading dimensions."""
    classes, *positions, features = linear_weight.shape
    made = input.reshape(-1, features) @ linear_weight.reshape(-1, features).T
    if linear_bias is not None:
        made = made + linear_bias.reshape(-1)
    return (made * logit_scale).reshape(-1, classes, *([math.prod(positions)] if positions else []))


def cross_entropy(
    z: Tensor, target: Tensor, *, weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = IGNORED,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    sample_weight: Tensor | None = None, normalizer: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, lse, and whether the largest logit is the target's. All tensors are of the flattened rows."""
    right = z.argmax(1)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    soft = target.is_floating_point()
    kept = torch.ones_like(z[:, 0], dtype=torch.bool) if soft else target != ignore_index
    right = right == (target.argmax(1) if soft else target)
    more: dict[str, Any] = {} if soft else {"ignore_index": ignore_index}
    losses = F.cross_entropy(z, target, weight, reduction="none", label_smoothing=label_smoothing, **more)
    lse = z.logsumexp(1)
    losses = losses + torch.where(kept, z_loss * lse.square(), 0.0)
    share = kept.double()
    if weight is not None and not soft:
        share = torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
    if sample_weight is not None:
        losses, share = losses * sample_weight, share * sample_weight
        right = right & (sample_weight != 0)
        kept = kept & (sample_weight != 0)
    right = (right & kept).double()
    if reduction == "none":
        return losses, lse, right
    loss = losses.sum()
    if reduction == "mean":
        loss = loss / (share.sum() if normalizer is None else normalizer)
    return loss, lse, right.sum() / kept.sum()


def focal_loss(
    z: Tensor, target: Tensor, alpha: Any = None, gamma: float = 2.0, reduction: str = "mean",
    sample_weight: Tensor | None = None, normalizer: Any = None,
) -> Tensor:  # fmt: skip
    kept = target != IGNORED
    picked = torch.where(kept, target, 0)
    log_p = z.log_softmax(1).gather(1, picked.unsqueeze(1)).squeeze(1)
    factor = 1.0 if alpha is None else alpha[picked] if isinstance(alpha, Tensor) else alpha
    share = kept.double() if sample_weight is None else torch.where(kept, sample_weight, 0.0)
    losses = -factor * (-torch.expm1(log_p)) ** gamma * log_p * share
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / (share.sum() if normalizer is None else normalizer)


def log_probs(z: Tensor, target: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    kept = target != IGNORED
    log_p = (z / temperature).log_softmax(1)
    picked = log_p.gather(1, torch.where(kept, target, 0).unsqueeze(1)).squeeze(1)
    return picked.where(kept, 0.0), -(log_p.exp() * log_p).sum(1).where(kept, 0.0)


# ---- the ways of autograd

# Forward makes the gradients, or keeps what backward needs for a sum, for each row, for each row with its lse.
ROUTES: dict[str, dict[str, Any]] = {
    "in forward": {},
    "in backward": {"grad_in_forward": False},
    "each row": {"reduction": "none"},
    "with lse": {"return_lse": True},
    "each row, with lse": {"return_lse": True, "reduction": "none"},
}


def call(leaves: Any, target: Tensor, chunk_rows: int | None = 5, **options: Any) -> list[Tensor]:
    bias = leaves[2] if len(leaves) > 2 else None
    results = L.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=bias, chunk_rows=chunk_rows, **options
    )  # fmt: skip
    return [results] if isinstance(results, Tensor) else list(results)


def grads(results: list[Tensor], leaves: Any, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(results, leaves, upstreams(*results), **options)


def exact_grads(leaves: Any, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = doubled(leaves)
    second = options.pop("return_lse", False)
    options.pop("grad_in_forward", None)
    z = logits(*leaves) if len(leaves) > 2 else logits(*leaves, None)
    return grads(list(cross_entropy(z, target, **options)[: 1 + second]), leaves)
