"""The calls that are compared with the whole loss, and their data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Data(NamedTuple):
    """Of all classes, in the dtype under test. Some rows are ignored, one is confident, and some have a mask."""

    logits: Tensor
    target: Tensor
    weight: Tensor  # of classes
    rows: Tensor  # weights of rows, some of them 0


def data(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, masked: bool = True) -> Data:
    generator = torch.Generator().manual_seed(seed)
    dim = min(len(shape) - 1, 1)
    classes = shape[dim]
    logits = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, shape[:dim] + shape[dim + 1 :], generator=generator)
    by_class, of_rows = logits.movedim(dim, -1).reshape(-1, classes), target.reshape(-1)
    by_class[0, of_rows[0]] += 60
    if masked and classes > 1:
        other = (of_rows[1::4] + 1) % classes
        by_class[torch.arange(1, len(of_rows), 4), other] = -torch.inf
    logits = by_class.view(*target.shape, classes).movedim(-1, dim).contiguous()
    if target.dim():
        target.view(-1)[2::5] = IGNORED
    weight = 0.5 + torch.rand(classes, generator=generator, dtype=torch.float64)
    rows = torch.rand(target.shape, generator=generator, dtype=torch.float64)
    if target.dim():
        rows.view(-1)[3::7] = 0
    return Data(logits.to(dtype), target, weight.to(dtype), rows.to(dtype))


class Call(NamedTuple):
    """The same for the functions of one process and of several."""

    run: Callable[..., Any]  # (functions, logits, data, **sharding)
    masked: bool = True  # False: a mask would make the loss infinite
    numbers: int = 3  # of a row that are sent


def _cross_entropy(weighted: bool = False, of_rows: bool = False, **options: Any) -> Call:
    def run(f: Any, x: Tensor, d: Data, **sharding: Any) -> Any:
        more = {"sample_weight": d.rows} if of_rows else {}
        return f.cross_entropy(x, d.target, d.weight if weighted else None, **options, **more, **sharding)

    smooth = options.get("label_smoothing", 0) > 0
    return Call(run, masked=not smooth, numbers=4 if smooth else 3)


def _focal(weighted: bool = False, of_rows: bool = False, **options: Any) -> Call:
    def run(f: Any, x: Tensor, d: Data, **sharding: Any) -> Any:
        more = {"sample_weight": d.rows} if of_rows else {}
        return f.focal_loss(x, d.target, d.weight if weighted else 0.25, **options, **more, **sharding)

    return Call(run)


def _log_probs(**options: Any) -> Call:
    def run(f: Any, x: Tensor, d: Data, **sharding: Any) -> Any:
        return f.log_probs(x, d.target, **options, **sharding)

    return Call(run, numbers=4 if options.get("return_entropy") else 3)


CALLS = {
    "mean": _cross_entropy(),
    "sum": _cross_entropy(reduction="sum"),
    "none": _cross_entropy(reduction="none"),
    "class weights": _cross_entropy(weighted=True),
    "row weights": _cross_entropy(weighted=True, of_rows=True),
    "row weights, none": _cross_entropy(of_rows=True, reduction="none"),
    "lse": _cross_entropy(return_lse=True, reduction="none"),
    "z-loss, softcap": _cross_entropy(z_loss=0.01, softcap=9.0),
    "softcap, lse": _cross_entropy(softcap=9.0, return_lse=True),
    "float32": _cross_entropy(out_dtype=torch.float32),
    "smoothing": _cross_entropy(label_smoothing=0.2),
    "smoothing, none": _cross_entropy(label_smoothing=0.2, reduction="none"),
    "smoothing alone": _cross_entropy(label_smoothing=1.0),
    "smoothing, all": _cross_entropy(
        weighted=True, of_rows=True, label_smoothing=0.2, z_loss=0.01, softcap=9.0, return_lse=True
    ),
    "focal": _focal(),
    "focal, class weights": _focal(weighted=True, reduction="none"),
    "focal, row weights": _focal(weighted=True, of_rows=True, gamma=0.5),
    "focal, gamma 0": _focal(gamma=0.0, reduction="sum"),
    "log-probabilities": _log_probs(),
    "temperature": _log_probs(temperature=0.7),
    "entropy": _log_probs(return_entropy=True),
    "temperature, entropy": _log_probs(temperature=0.7, return_entropy=True),
}


def outputs(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def weighed(results: Any, seed: int = 1) -> Tensor:
    """A number whose gradient is a random upstream gradient of every result, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64)
    for each in outputs(results):
        upstream = torch.randn(each.shape, generator=generator, dtype=torch.float64).bfloat16()  # exact in every dtype
        total = total + (each.double() * upstream.double()).sum()
    return total
