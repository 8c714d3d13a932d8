"""The losses that are measured: as torch's users write them, and fused; with the targets they take."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fusedloss.functional as L
from fusedloss._route import LOSSES

from .case import Loss, Target
from .results import EAGER, OURS

GAMMA, ALPHA, SMOOTHING = 2.0, 0.25, 0.1


def values(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(input.shape, generator=generator, device=input.device).to(input.dtype)


def zeros_and_ones(input: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(2, input.shape, generator=generator, device=input.device, dtype=torch.int8)
    return bits.to(input.dtype)


def labels(input: Tensor, generator: torch.Generator) -> Tensor:
    """1 and -1."""
    return 2 * zeros_and_ones(input, generator) - 1


def probabilities(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(input.shape, generator=generator, device=input.device).to(input.dtype)


def counts(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randint(6, input.shape, generator=generator, device=input.device).to(input.dtype)


def class_indices(input: Tensor, generator: torch.Generator) -> Tensor:
    shape = input.shape[:1] + input.shape[2:]
    return torch.randint(input.shape[1], shape, generator=generator, device=input.device)


def class_or_background(input: Tensor, generator: torch.Generator) -> Tensor:
    shape = input.shape[:1] + input.shape[2:]
    return torch.randint(input.shape[1] + 1, shape, generator=generator, device=input.device)


def class_probabilities(input: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(input.shape, generator=generator, device=input.device).softmax(1).to(input.dtype)


def eager_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target)


def fused_cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target)


def cross_entropy_in_forward(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target, grad_in_forward=True)


def eager_smoothed(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target, class_weights(input), label_smoothing=SMOOTHING)


def fused_smoothed(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target, class_weights(input), label_smoothing=SMOOTHING)


def eager_row_weighted(input: Tensor, target: Tensor) -> Tensor:
    weight = weights((len(target),), input.dtype)
    return (F.cross_entropy(input, target, reduction="none") * weight).sum() / weight.sum()


def fused_row_weighted(input: Tensor, target: Tensor) -> Tensor:
    return L.cross_entropy(input, target, sample_weight=weights((len(target),), input.dtype))


TEMPERATURE = 2.0


def eager_distillation(input: Tensor, target: Tensor) -> Tensor:
    log_q, p = F.log_softmax(input / TEMPERATURE, -1), F.softmax(target / TEMPERATURE, -1)
    return F.kl_div(log_q, p, reduction="batchmean")


def fused_distillation(input: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = L.kl_divergence(input, target, temperature=TEMPERATURE)
    return loss


_KEPT: dict[tuple[tuple[int, ...], torch.dtype], Tensor] = {}


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Made once. torch.compile finds them in the dictionary; it would look through a functools.cache, and make them
    anew in each call."""
    if (shape, dtype) not in _KEPT:
        _KEPT[shape, dtype] = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5).to(dtype)
    return _KEPT[shape, dtype]


def class_weights(input: Tensor) -> Tensor:
    return weights((input.shape[1],), input.dtype)


def half_ignored(input: Tensor, generator: torch.Generator) -> Tensor:
    target = class_indices(input, generator)
    rows = torch.randperm(len(target), generator=generator, device=target.device)
    return target.index_fill_(0, rows[: len(target) // 2], -100)


def eager_linear(input: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, head), target)


def fused_linear(input: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return L.linear_cross_entropy(input, head, target)


def chunked_linear(input: Tensor, head: Tensor, target: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return F.linear_cross_entropy(input, head, target, options=options)  # type: ignore[attr-defined, no-any-return]


def fused_linear_of_all(input: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return L.linear_cross_entropy(input, head, target.clamp(min=0))


class _Products(torch.autograd.Function):
    """The three matrix products of a linear loss and its gradients, with the whole logits in the place of theirs."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, head: Tensor) -> Tensor:
        logits = input @ head.t()
        ctx.save_for_backward(input, head, logits)
        return logits[0, 0].clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        input, head, logits = ctx.saved_tensors
        return logits @ head, logits.t() @ input


def products(input: Tensor, head: Tensor, target: Tensor) -> Tensor:
    """No loss: what any of them takes at least."""
    return _Products.apply(input, head)


def eager_focal(input: Tensor, target: Tensor) -> Tensor:
    ce = F.cross_entropy(input, target, reduction="none")
    p = torch.exp(-ce)
    return ((1 - p) ** GAMMA * ce).mean()


def fused_focal(input: Tensor, target: Tensor) -> Tensor:
    return L.focal_loss(input, target, gamma=GAMMA)


def native_focal(input: Tensor, target: Tensor) -> Tensor:
    return LOSSES["focal"].native(input, target, None, "mean", -100, 1.0, GAMMA)


def eager_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    """As detectors write it: the one-hot target is built in every step."""
    one_hot = F.one_hot(target, input.shape[1] + 1)[..., :-1].movedim(-1, 1)
    return sigmoid_focal(F, input, one_hot.to(input.dtype))


def fused_sigmoid_focal_indexed(input: Tensor, target: Tensor) -> Tensor:
    return L.sigmoid_focal_loss(input, target, ALPHA, GAMMA, "mean")


# A call of a pointwise loss through a namespace of functions, torch's or this package's.
Call = Callable[[Any, Tensor, Tensor], Tensor]


def with_both_weights(f: Any, x: Tensor, t: Tensor) -> Tensor:
    columns = math.gcd(x.numel(), 64)
    x, t = x.view(-1, columns), t.view(-1, columns)
    weight, pos_weight = weights(tuple(x.shape), x.dtype), weights((columns,), x.dtype)
    loss: Tensor = f.binary_cross_entropy_with_logits(x, t, weight, pos_weight=pos_weight)
    return loss


def with_pos_weight(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """One factor for each of 64 classes, read through its strides; the first targets serve as factors."""
    x, t = x.view(-1, 64), t.view(-1, 64)
    loss: Tensor = f.binary_cross_entropy_with_logits(x, t, pos_weight=t[0])
    return loss


def sigmoid_focal(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """For torch, the formula of ``torchvision.ops.sigmoid_focal_loss``."""
    if f is L:
        return L.sigmoid_focal_loss(x, t, ALPHA, GAMMA, "mean")
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    alpha_t = ALPHA * t + (1 - ALPHA) * (1 - t)
    return (alpha_t * (ce * ((1 - p_t) ** GAMMA))).mean()


def asymmetric(f: Any, x: Tensor, t: Tensor) -> Tensor:
    """For torch, its authors' formula, which timm has too."""
    if f is L:
        return L.asymmetric_loss(x, t)
    positive = torch.sigmoid(x)
    negative = (1 - positive + 0.05).clamp(max=1)
    loss = t * torch.log(positive.clamp(min=1e-8)) + (1 - t) * torch.log(negative.clamp(min=1e-8))
    weight = torch.pow(1 - (positive * t + negative * (1 - t)), t + 4 * (1 - t))
    return -(loss * weight).sum()


def multilabel_soft_margin(f: Any, x: Tensor, t: Tensor) -> Tensor:
    columns = math.gcd(x.numel(), 1024)
    loss: Tensor = f.multilabel_soft_margin_loss(x.view(-1, columns), t.view(-1, columns))
    return loss


POINTWISE: dict[str, tuple[Call, Target]] = {
    "huber": (lambda f, x, t: f.huber_loss(x, t), values),
    "smooth_l1": (lambda f, x, t: f.smooth_l1_loss(x, t), values),
    "mse": (lambda f, x, t: f.mse_loss(x, t), values),
    "l1": (lambda f, x, t: f.l1_loss(x, t), values),
    "bce": (lambda f, x, t: f.binary_cross_entropy(x, t), zeros_and_ones),
    "bce_with_logits": (lambda f, x, t: f.binary_cross_entropy_with_logits(x, t), zeros_and_ones),
    "bce_with_logits_and_weights": (with_both_weights, zeros_and_ones),
    "bce_with_logits_and_pos_weight": (with_pos_weight, zeros_and_ones),
    "sigmoid_focal": (sigmoid_focal, zeros_and_ones),
    "asymmetric": (asymmetric, zeros_and_ones),
    "hinge_embedding": (lambda f, x, t: f.hinge_embedding_loss(x, t), labels),
    "soft_margin": (lambda f, x, t: f.soft_margin_loss(x, t), labels),
    "kl_div": (lambda f, x, t: f.kl_div(x, t, reduction="batchmean"), probabilities),
    "kl_div_log_target": (lambda f, x, t: f.kl_div(x, t, reduction="batchmean", log_target=True), values),
    "poisson_nll": (lambda f, x, t: f.poisson_nll_loss(x, t), counts),
    "poisson_nll_full": (lambda f, x, t: f.poisson_nll_loss(x, t, full=True), counts),
    "multilabel_soft_margin": (multilabel_soft_margin, zeros_and_ones),
}


def variances(input: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(input.shape, generator=generator, device=input.device) + 0.5).to(input.dtype)


# Of two inputs and a target: the call, what makes the second input, and what makes the target.
OF_THREE: dict[str, tuple[Callable[[Any, Tensor, Tensor, Tensor], Tensor], Target, Target]] = {
    "margin_ranking": (lambda f, x, other, t: f.margin_ranking_loss(x, other, t, margin=0.5), values, labels),
    "gaussian_nll": (lambda f, x, var, t: f.gaussian_nll_loss(x, t, var), variances, values),
}


def labels_of_rows(input: Tensor, generator: torch.Generator) -> Tensor:
    return labels(input[:, 0], generator)


# Of rows: the call, what makes a second operand, if there is one, and what makes the target, or the third operand.
OF_ROWS: dict[str, tuple[Callable[..., Tensor], Target | None, Target]] = {
    "cosine_embedding": (lambda f, x, other, y: f.cosine_embedding_loss(x, other, y, 0.1), values, labels_of_rows),
    "triplet_margin": (lambda f, x, near, far: f.triplet_margin_loss(x, near, far), values, values),
    "multi_margin": (lambda f, x, y: f.multi_margin_loss(x, y), None, class_indices),
}


def of_rows(name: str) -> dict[str, Loss]:
    call = OF_ROWS[name][0]
    return {EAGER: functools.partial(call, F), OURS: functools.partial(call, L)}


def pointwise(name: str) -> dict[str, Loss]:
    call = (OF_THREE if name in OF_THREE else POINTWISE)[name][0]
    return {EAGER: functools.partial(call, F), OURS: functools.partial(call, L)}


CROSS_ENTROPY: dict[str, Loss] = {EAGER: eager_cross_entropy, OURS: fused_cross_entropy}
DISTILLATION: dict[str, Loss] = {EAGER: eager_distillation, OURS: fused_distillation}
LINEAR: dict[str, Loss] = {EAGER: eager_linear, OURS: fused_linear, "products": products}
# Torch has chunks since 2.13.
HAS_CHUNKS = hasattr(torch.nn, "LinearCrossEntropyOptions")
LINEAR_AND_CHUNKS: dict[str, Loss] = {**LINEAR, **({"torch's chunks": chunked_linear} if HAS_CHUNKS else {})}
LINEAR_HALF_IGNORED: dict[str, Loss] = {EAGER: eager_linear, OURS: fused_linear, "none ignored": fused_linear_of_all}
SMOOTHED: dict[str, Loss] = {EAGER: eager_smoothed, OURS: fused_smoothed}
ROW_WEIGHTED: dict[str, Loss] = {EAGER: eager_row_weighted, OURS: fused_row_weighted}
FOCAL: dict[str, Loss] = {EAGER: eager_focal, OURS: fused_focal}
# "native" is the formula that fusedloss falls back to, where it differs from what users write.
FOCAL_AND_NATIVE: dict[str, Loss] = {**FOCAL, "native": native_focal}
SIGMOID_FOCAL_INDEXED: dict[str, Loss] = {EAGER: eager_sigmoid_focal_indexed, OURS: fused_sigmoid_focal_indexed}
