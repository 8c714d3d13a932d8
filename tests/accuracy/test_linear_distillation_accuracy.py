"""Linear divergences of random calls are no further from float64 than torch's matrix products and its softmax.

In float64 contract/test_linear_distillation.py compares them with the same formula, whose errors are of their size.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from distillation_calls import DIRECTIONS, REDUCTIONS, TEACHERS, reduced
from hypothesis import given
from linear_calls import norm_error
from linear_distillation_calls import (
    NAMES,
    call,
    exact,
    grads,
    labels_of,
    leaves,
    operands,
    weight_of,
    with_numbers,
)
from losses import HALVES
from marks import needs_extension
from pytest import mark
from torch import Tensor

TIMES_TORCHS = 2
OF_TERMS = 4  # of the arithmetic's, at the largest numbers that a result is a difference of
ROUNDINGS = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4}


class RandomCall(NamedTuple):
    rows: tuple[int, ...]
    features: int
    classes: int
    dtype: torch.dtype
    teacher_is: str
    chunk_rows: int
    asked: tuple[bool, ...]  # of input, head and bias: which gradients
    of_rows: str
    options: dict[str, Any]


def random_call(choices: Choices) -> RandomCall:
    of = choices.of
    rows = of([(choices.between(1, 40),), (choices.between(1, 5), choices.between(1, 8)), ()])
    asked = [of([True, True, False]) for _ in NAMES]
    if not any(asked):
        asked[0] = True
    options = {
        "direction": of(DIRECTIONS), "temperature": of([1.0, 2.0, 0.7]), "beta": of([0.5, 0.1, 0.9]),
        "reduction": of(REDUCTIONS), "grad_in_forward": of([None, False]),
    }  # fmt: skip
    return RandomCall(
        rows, choices.between(3, 20), choices.between(2, 40), of(list(ROUNDINGS)), of(["hidden states", *TEACHERS]),
        choices.between(1, 50), tuple(asked), of(["", "labels", "weight", "labels, weight"]), options,
    )  # fmt: skip


def torchs(given: dict[str, Tensor], teacher_is: str, options: dict[str, Any]) -> list[Tensor]:
    """The loss and its gradients as torch's users write it, in the operands' dtype."""
    leaf = {name: each.detach().requires_grad_(each.requires_grad) for name, each in given.items()}
    tau, beta = options["temperature"], options["beta"]
    log_q = (F.linear(*(leaf[name] for name in NAMES)) / tau).log_softmax(-1)
    teacher = leaf["teacher"]
    if "teacher_weight" in leaf:
        teacher = F.linear(teacher, leaf["teacher_weight"], leaf["teacher_bias"])
    log_p = {"log_probs": lambda: teacher, "probs": teacher.log}.get(
        teacher_is, lambda: (teacher / tau).log_softmax(-1)
    )()
    q, p = log_q.exp(), log_p.exp()
    if options["direction"] == "jsd":
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        losses = (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)
    else:
        losses = (p * (log_p - log_q) if options["direction"] == "forward" else q * (log_q - log_p)).sum(-1)
    kept = options["labels"] != -100 if "labels" in options else None
    loss = reduced(losses, log_q.shape[-1], options["reduction"], kept, options.get("weight")).to(log_q.dtype)
    return [loss.detach(), *grads(loss, leaves(leaf))]


@needs_extension
@mark.examples
@given(one_draw(random_call))
def test_random_calls_are_as_exact_as_torchs(drawn):
    given = operands(drawn.rows, drawn.dtype, drawn.classes, drawn.features)
    for name, want in zip(NAMES, drawn.asked, strict=True):
        given[name].requires_grad_(want)
    teacher_is = "logits"
    if drawn.teacher_is != "hidden states":
        given, teacher_is = with_numbers(given, drawn.teacher_is), drawn.teacher_is
        if teacher_is == "probs":  # of which float16 has some as 0
            given["teacher"] = given["teacher"].clamp_min(2.0**-20)
    options = dict(drawn.options)
    if "labels" in drawn.of_rows:
        options["labels"] = labels_of(drawn.rows)
    if "weight" in drawn.of_rows:
        options["weight"] = weight_of(drawn.rows, drawn.dtype)

    def ours(chunk_rows: int) -> list[Tensor]:
        loss = call(given, chunk_rows, teacher_is=teacher_is, **options)
        return [loss.detach(), *grads(loss, leaves(given))]

    value, of_leaves = exact(given, teacher_is=teacher_is, **options)
    eps = torch.finfo(drawn.dtype).eps
    step = torch.finfo(torch.float32).eps
    of_rows = {"none": 1.0, "sum": math.prod(drawn.rows), "batchmean": 1.0, "mean": 1 / drawn.classes}
    largest = max(1.0, *(float(given[name].abs().max()) for name in NAMES)) / min(1.0, drawn.options["temperature"])
    terms = OF_TERMS * step * largest * of_rows[drawn.options["reduction"]]
    together = zip(
        ours(drawn.chunk_rows), ours(100), torchs(given, teacher_is, options), [value, *of_leaves], strict=True
    )
    for got, whole, native, each in together:
        if each.isnan().any() or not each.any():
            assert torch.equal(got.isnan(), each.isnan())
            continue
        slack = ROUNDINGS[drawn.dtype] * eps + terms / float(each.norm())
        assert norm_error(got, each) <= TIMES_TORCHS * norm_error(native, each) + slack
        assert norm_error(got, whole.double()) <= (3 if drawn.dtype in HALVES else 64) * eps + terms / float(
            each.norm()
        )
