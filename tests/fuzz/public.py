"""Random calls of the public functions, right and broken ones: python tests/fuzz/public.py --seconds 3600

A call must do what torch's function of that name does, or where torch has none, what the same call does natively: the
same error, or results of the same shape, dtype and numbers, with the same gradients.
"""

import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]  # the checkout's package

from random_calls import DTYPES, LAYOUTS, mistaken
from running import main, words

import fusedloss.functional as L

TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 8e-2, torch.float16: 1e-2}
HALVES = (torch.bfloat16, torch.float16)


class Native(Tensor):
    """A tensor that no kernel takes."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Draw(random.Random):
    """Draws one call's tensors, of sizes and a dtype in common."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(self.randrange(1 << 30))
        self.dtype = self.choice(DTYPES)
        self.rows, self.classes = self.randint(1, 6), self.choice((1, 2, 5, 17, 40))
        self.shape = self.choice([(), (self.classes,), (self.rows, self.classes), (self.rows, self.classes, 3)])
        self.of_rows = self.choice([(self.rows, self.classes), (self.rows, self.classes, 3), (self.classes,)])
        self.labels = self.of_rows[:1] + self.of_rows[2:] if len(self.of_rows) > 1 else ()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def share(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) * 0.9 + 0.05).to(self.dtype)

    def signs(self, *shape: int) -> Tensor:
        return 2 * self.share(*shape).round() - 1

    def classes_of(self, *shape: int) -> Tensor:
        index = torch.randint(self.of_rows[min(1, len(self.of_rows) - 1)], shape, generator=self.generator)
        return torch.where(torch.rand(shape, generator=self.generator) < 0.2, -100, index)

    def weight(self, *shape: int) -> Tensor | None:
        return self.share(*shape) if self.random() < 0.3 else None

    def class_weight(self) -> Tensor | None:
        return self.weight(self.of_rows[min(1, len(self.of_rows) - 1)])

    def number(self, *usual: float) -> float:
        return self.choice(usual)


def _elements(target: Callable[[Draw], Tensor], **numbers: tuple[float, ...]) -> Callable[[Draw], dict[str, Any]]:
    return lambda d: {"input": d.normal(*d.shape), "target": target(d)} | {
        name: d.choice(usual) for name, usual in numbers.items()
    }


def _of_classes(**numbers: tuple[Any, ...]) -> Callable[[Draw], dict[str, Any]]:
    return lambda d: {
        "input": d.normal(*d.of_rows), "target": d.classes_of(*d.labels), "weight": d.class_weight()
    } | {name: d.choice(usual) for name, usual in numbers.items()}  # fmt: skip


def _indexed(**numbers: tuple[Any, ...]) -> Callable[[Draw], dict[str, Any]]:
    """Class indices of a loss over elements."""

    def draw(d: Draw) -> dict[str, Any]:
        d.of_rows = (d.rows, d.classes, *d.choice([(), (3,), (2, 3)]))
        target = d.classes_of(d.rows, *d.of_rows[2:])
        given = {"input": d.normal(*d.of_rows), "target": target, "weight": d.weight(*d.of_rows[-1:])}
        return given | {name: d.choice(usual) for name, usual in numbers.items()}

    return draw


def _values(d: Draw) -> Tensor:
    return d.normal(*d.shape)


def _shares(d: Draw) -> Tensor:
    return d.share(*d.shape)


# What the arguments of each function are drawn by. A name ends at a colon, behind which stands its form.
FUNCTIONS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "mse_loss": _elements(_values),
    "l1_loss": _elements(_values),
    "smooth_l1_loss": _elements(_values, beta=(1.0, 0.0, 0.3)),
    "huber_loss": _elements(_values, delta=(1.0, 0.5)),
    "binary_cross_entropy": lambda d: {
        "input": d.share(*d.shape), "target": d.share(*d.shape), "weight": d.weight(*d.shape[-1:])
    },
    "binary_cross_entropy_with_logits": lambda d: {
        "input": d.normal(*d.shape), "target": d.share(*d.shape), "weight": d.weight(*d.shape[-1:]),
        "pos_weight": d.weight(*d.shape[-1:]),
    },
    "hinge_embedding_loss": lambda d: {
        "input": d.normal(*d.shape), "target": d.signs(*d.shape), "margin": d.choice((1.0, 0.3))
    },
    "soft_margin_loss": lambda d: {"input": d.normal(*d.shape), "target": d.signs(*d.shape)},
    "multilabel_soft_margin_loss": lambda d: {
        "input": d.normal(*d.of_rows), "target": d.share(*d.of_rows).round(), "weight": d.weight(*d.of_rows[-1:])
    },
    "kl_div": _elements(_shares, log_target=(False, True)),
    "poisson_nll_loss": _elements(_shares, log_input=(True, False), full=(False, True), eps=(1e-8, 0.1)),
    "gaussian_nll_loss": lambda d: {
        "input": d.normal(*d.of_rows), "target": d.normal(*d.of_rows),
        "var": d.choice((d.share(*d.of_rows), d.share(*d.of_rows[:-1], 1), d.share(*d.of_rows[:-1]))),
        "full": d.choice((False, True)),
    },
    "margin_ranking_loss": lambda d: {
        "input1": d.normal(*d.shape), "input2": d.normal(*d.shape), "target": d.signs(*d.shape),
        "margin": d.choice((0.0, 0.5)),
    },
    "cosine_embedding_loss": lambda d: {
        "input1": d.normal(d.rows, d.classes), "input2": d.normal(d.rows, d.classes), "target": d.signs(d.rows),
        "margin": d.choice((0.0, 0.5)),
    },
    "triplet_margin_loss": lambda d: {
        "anchor": d.normal(d.rows, d.classes), "positive": d.normal(d.rows, d.classes),
        "negative": d.normal(d.rows, d.classes), "margin": d.choice((1.0, 0.3)), "p": d.choice((2.0, 1.0, 3.0)),
        "swap": d.choice((False, True)),
    },
    "multi_margin_loss": lambda d: {
        "input": d.normal(d.rows, d.classes), "target": torch.randint(d.classes, (d.rows,), generator=d.generator),
        "p": d.choice((1, 2)), "margin": d.choice((1.0, 0.3)), "weight": d.weight(d.classes),
    },
    "nll_loss": _of_classes(ignore_index=(-100, 1)),
    "cross_entropy": _of_classes(ignore_index=(-100, 1), label_smoothing=(0.0, 0.1)),
    "focal_loss": _of_classes(ignore_index=(-100, 1), gamma=(2.0, 0.0, 1.5), label_smoothing=(0.0, 0.1)),
    "log_probs": lambda d: {
        "input": d.normal(*d.of_rows), "target": d.classes_of(*d.labels), "temperature": d.choice((1.0, 0.7)),
    },
    "sigmoid_focal_loss": _elements(_shares, gamma=(2.0, 0.0), alpha=(0.25, -1.0)),
    "sigmoid_focal_loss:indices": _indexed(gamma=(2.0, 0.0), ignore_index=(-100, 1)),
    "asymmetric_loss": _elements(lambda d: d.share(*d.shape).round(), gamma_neg=(4.0, 0.0), clip=(0.05, 0.0)),
    "asymmetric_loss:indices": _indexed(ignore_index=(-100, 1)),
    "binary_cross_entropy_with_logits:indices": _indexed(ignore_index=(-100, 1)),
    "kl_divergence": lambda d: {
        "student_logits": d.normal(*d.shape), "teacher": d.normal(*d.shape),
        "direction": d.choice(("forward", "reverse", "jsd")), "temperature": d.choice((1.0, 2.0)),
        "weight": d.weight(*d.shape[:-1]),
    },
}  # fmt: skip
_REDUCTIONS = ("mean", "sum", "none")


def problems(seed: int) -> Iterator[str]:
    """What is wrong with the call of a seed."""
    draw = Draw(seed)
    form = draw.choice(list(FUNCTIONS))
    name = form.partition(":")[0]
    given = FUNCTIONS[form](draw)
    if name != "log_probs":
        given["reduction"] = draw.choice(_REDUCTIONS)
    broken = []
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        which = draw.choice([each for each in given if each not in broken])
        if isinstance(given[which], Tensor) and draw.random() < 0.3:
            given[which] = draw.choice(LAYOUTS)(given[which])
        else:
            given[which] = mistaken(given[which], draw)
            broken.append(which)
    call = f"{name}({', '.join(f'{n}={words(each)}' for n, each in given.items())}), broken: {broken}"
    theirs = getattr(F, name, None) if form == name else None
    if any(isinstance(each, Tensor) and each.layout != torch.strided for each in given.values()):
        return  # everywhere/ has sparse operands
    ours = _outcome(getattr(L, name), given)
    expected = _outcome(theirs, given) if theirs else _outcome(getattr(L, name), given, native=True)
    if isinstance(ours, Exception) or isinstance(expected, Exception):
        # An error is ours to raise where torch's own words fail it, or where it takes no bytes.
        of_bytes = any(isinstance(each, Tensor) and each.dtype == torch.uint8 for each in given.values())
        both = isinstance(ours, Exception) and isinstance(expected, Exception)
        if type(ours) is not type(expected) and not of_bytes and not (both and len(broken) > 1):  # of two mistakes
            yield f"{call} gave {_brief(ours)}, expected {_brief(expected)}"
        return
    rtol = _tolerance(given)
    found = list(_differences(ours, expected, rtol))
    if found and theirs and any(_is_half(each) for each in given.values()):  # torch rounds between its steps
        exact = _outcome(theirs, {n: each.double() if _is_half(each) else each for n, each in given.items()})
        if not isinstance(exact, Exception):
            found = list(_differences(ours, _rounded(exact, expected), rtol))
    yield from (f"{call}: {each}" for each in found)


def _outcome(function: Any, given: dict[str, Any], native: bool = False) -> Any:
    """Its results and the gradients of the floating point arguments, or its error."""
    copies = {name: _leaf(each) if isinstance(each, Tensor) else each for name, each in given.items()}
    if native:
        arguments = {n: each.as_subclass(Native) if isinstance(each, Tensor) else each for n, each in copies.items()}
    else:
        arguments = copies
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(**arguments)
            wanted = [each for each in copies.values() if isinstance(each, Tensor) and each.requires_grad]
            if not (isinstance(result, Tensor) and wanted and result.requires_grad) or result.is_meta:
                return [result, ()]
            upstream = torch.linspace(0.5, 2, max(1, result.numel())).to(result.dtype)[: result.numel()]
            grads = torch.autograd.grad(result, wanted, upstream.view(result.shape), allow_unused=True)
            return [result.detach(), grads]
    except Exception as error:
        return error


def _leaf(given: Tensor) -> Tensor:
    """The first operands want gradients, in the layout that was drawn."""
    return given.detach().requires_grad_(given.is_floating_point() and given.layout == torch.strided)


def _is_half(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dtype in HALVES


def _rounded(numbers: Any, like: Any) -> Any:
    """Results in float64 in the dtypes of others."""
    if isinstance(numbers, Tensor) and isinstance(like, Tensor):
        return numbers.to(like.dtype)
    if isinstance(numbers, list | tuple):
        return [_rounded(*pair) for pair in zip(numbers, like, strict=False)]
    return like


def _tolerance(given: dict[str, Any]) -> float:
    """Of the coarsest operand, in whose dtype torch may compute; infinite where numbers may overflow on the way, of
    which other tests say what becomes."""
    if any(isinstance(each, Tensor) and (each.is_meta or each.dtype == torch.uint8) for each in given.values()):
        return float("inf")  # no numbers, or bytes, of which docs/differences.md says what torch makes
    floats = [each for each in given.values() if isinstance(each, Tensor) and each.dtype in DTYPES and each.numel()]
    if not all(each.isfinite().all() and each.abs().max() < 50 for each in floats):
        return float("inf")
    return max((TOLERANCES[each.dtype] for each in floats), default=0.0)


def _differences(ours: Any, expected: Any, rtol: float) -> Iterator[str]:
    (value, grads), (wanted, wanted_grads) = ours, expected
    pairs = [(value, wanted, "the result"), *((g, w, "a gradient") for g, w in zip(grads, wanted_grads, strict=False))]
    for got, want, what in pairs:
        if not isinstance(got, Tensor) or not isinstance(want, Tensor):
            if (got is None) != (want is None) and (got if want is None else want).any():
                yield f"{what} is {words(got)}, expected {words(want)}"
            continue
        if (got.shape, got.dtype, got.device) != (want.shape, want.dtype, want.device):
            yield f"{what} is {words(got)}, expected {words(want)}"
            continue
        if rtol == float("inf") or got.layout != torch.strided or not got.is_floating_point() or not got.numel():
            continue
        known = want.isfinite()  # elsewhere ours may know better, and other tests say so
        scale = max(1.0, want[known].abs().max().item()) if known.any() else 1.0
        if not torch.allclose(got[known].double(), want[known].double(), rtol=rtol, atol=rtol * scale):
            yield f"{what} differs: {got.flatten()[:4].tolist()} expected {want.flatten()[:4].tolist()}"


def _brief(outcome: Any) -> str:
    if isinstance(outcome, Exception):
        return f"{type(outcome).__name__}: {str(outcome).partition(chr(10))[0][:120]}"
    return words(outcome[0])


if __name__ == "__main__":
    sys.exit(main(problems))
