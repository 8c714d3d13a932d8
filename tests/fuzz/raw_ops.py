"""Random calls of the raw ops, right ones and broken ones: python tests/fuzz/raw_ops.py --seconds 3600

A call must raise an error of Python, or return what its fake kernel says, the numbers of the native formula, and leave
its arguments as they were. What is found is printed with the seed that shows it again: --seed N --calls 1.
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2])]  # the checkout's package

from random_calls import FAMILIES, LAYOUTS, LOSSES, Op, mistaken, ops, right
from running import main, words

from fusedloss import _decomposed, _route
from fusedloss._library import extension

EXPECTED = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)
TOLERANCES = {
    torch.float32: 2e-4,
    torch.float64: 1e-8,  # a bound of BCE is the float nearest to 1e-12 in torch
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}
_OPS = ops()


def problems(seed: int) -> Iterator[str]:
    """What is wrong with the call of a seed."""
    draw = random.Random(seed)
    op = draw.choice(_OPS)
    given = right(op, draw)
    broken = []
    for _ in range(draw.choice((0, 1, 1, 1, 2))):
        name = draw.choice([each for each in given if each not in broken])
        if isinstance(given[name], Tensor) and draw.random() < 0.3:
            given[name] = draw.choice(LAYOUTS)(given[name])
            if FAMILIES.get(op.loss) == "row_sums" or name == "statistics":
                broken.append(name)  # whose numbers have to lie side by side
        else:
            given[name] = mistaken(given[name], draw, foreign=draw.random() < 0.3)
            broken.append(name)
    call = f"{op.name}({', '.join(f'{name}={words(each)}' for name, each in given.items())}), broken: {broken}"
    before = {name: _copy(each) for name, each in given.items()}
    try:
        got = op.call(**given)
    except EXPECTED as error:
        if not broken:
            yield f"{call} raised {type(error).__name__}: {str(error)[:200]}"
        return
    except Exception as error:
        if not any(given[name] is None for name in broken):  # a fake kernel takes what is not there for a tensor
            yield f"{call} raised {error!r}"
        return
    if not op.kind.endswith("_"):
        for name, each in given.items():
            if isinstance(each, Tensor) and not _same(each, before[name]):
                yield f"{call} changed {name}"
    results = _tensors(got)
    if any(isinstance(each, Tensor) and each.is_meta for each in given.values()):
        return  # which is a fake call
    yield from (f"{call}: {words}" for words in unlike_fake(op, given, results))
    if op.kind in ("", "_with_grad", "_backward"):
        yield from (f"{call}: {words}" for words in unlike_formula(op, given, results, broken))


def unlike_fake(op: Op, given: dict[str, Any], results: list[Tensor]) -> Iterator[str]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        try:
            faked = {name: mode.from_tensor(each) if isinstance(each, Tensor) else each for name, each in given.items()}
            fakes = _tensors(op.call(**faked))
        except EXPECTED as error:
            yield f"its fake kernel raised {str(error)[:200]}"
            return
    for got, fake in zip(results, fakes, strict=True):
        if (got.shape, got.dtype, got.device) != (fake.shape, fake.dtype, fake.device):
            yield f"gave {words(got)}, its fake kernel {words(fake)}"
        elif got.numel() > 1 and [s for s, n in zip(got.stride(), got.shape, strict=True) if n > 1] != [
            s for s, n in zip(fake.stride(), fake.shape, strict=True) if n > 1
        ]:
            yield f"gave strides {got.stride()}, its fake kernel {fake.stride()}"


def unlike_formula(op: Op, given: dict[str, Any], results: list[Tensor], broken: list[str]) -> Iterator[str]:
    if not _is_comparable(op, given, broken):
        return
    try:
        expected = _expected(op, given)
    except EXPECTED as error:
        if not broken:  # torch refuses some shapes and dtypes that an op can do
            yield f"its formula raised {str(error)[:200]}"
        return
    for got, value in zip([results[0], results[-1]][: len(expected)], expected, strict=True):
        rtol = TOLERANCES[got.dtype]
        if op.kind == "_backward" and got.shape != value.shape:
            got = got.sum_to_size(value.shape)  # the node sums what broadcast
        if got.shape != value.shape:
            yield f"gave {words(got)}, its formula {words(value)}"
            continue
        known = value.isfinite()  # elsewhere, such as at targets that are no probabilities, an op may know better
        atol = rtol * max(1.0, value[known].abs().max().item() if known.any() else 0)
        try:
            torch.testing.assert_close(got.double()[known], value.double()[known], rtol=rtol, atol=atol)
        except AssertionError as error:
            yield f"its formula differs: {str(error)[:200]}"


def _expected(op: Op, given: dict[str, Any]) -> list[Tensor]:
    """The loss and the gradient of a call in float64, as far as the op returns them."""
    exact = {name: each.detach().double() if _is_float(each) else each for name, each in given.items()}
    if "params" in exact:  # what is not given is 0, what is too much is not read
        count = len(LOSSES[op.loss].params)
        exact["params"] = [*exact["params"], *[0.0] * count][:count]
    upstream = exact.get("upstream")
    of = "third" if exact.get("of_third") else "target" if exact.get("of_target") else _input_of(exact)
    forward = {name: each for name, each in exact.items() if name not in _OF_BACKWARD}
    if FAMILIES.get(op.loss) == "softmax":
        forward["second"] = False
    if op.loss == "kl_divergence":
        forward.update(wide=False, with_lse=False, with_grad=False)
    if op.kind:
        forward[of].requires_grad_()
    loss = _tensors(_formula(op)(**forward))[0]
    if not op.kind:
        return [loss]
    (gradient,) = torch.autograd.grad(loss, forward[of], upstream)
    return [gradient] if op.kind == "_backward" else [loss.detach(), gradient]


def _input_of(given: dict[str, Any]) -> str:
    return next(name for name in ("input", "logits", "first", "student") if name in given)


# What a backward is given beside the arguments of its forward.
_OF_BACKWARD = (
    "upstream", "upstream_second", "upstream_lse", "statistics", "carrier", "of_first", "of_second", "of_target",
    "of_third", "unrounded",
)  # fmt: skip


def _is_comparable(op: Op, given: dict[str, Any], broken: list[str]) -> bool:
    """Whether the formula says what a call gives. Where results may be infinite, other tests say what they are."""
    numbers = [each for each in given.values() if _is_float(each) and each.numel()]
    if not all(each.isfinite().all() and each.abs().max() < 1e3 for each in numbers):
        return False
    others = [each for each in given.values() if isinstance(each, float)] + list(given.get("params", []))
    if not all(each == 0 or 1e-7 < abs(each) < 1e3 for each in others):
        return False
    if "statistics" in given and not {"upstream"}.issuperset(broken):
        return False  # they are of another call
    if given.get("upstream_second") is not None or given.get("upstream_lse") is not None:
        return False
    return FAMILIES.get(op.loss) != "row_sums" or not {"of_first", "of_second", "of_third"}.intersection(broken)


def _formula(op: Op) -> Any:
    if op.loss == "kl_divergence":
        from fusedloss.distillation._ops import _decomposed as of_pair

        return lambda **given: of_pair(*given.values())
    known = extension.losses[op.loss]  # type: ignore[union-attr]
    if known.family == "softmax":
        return _decomposed.softmax(_route.LOSSES[op.loss].native, known.saved_by)
    if known.family == "row_sums":
        return _decomposed.row_sums(_route.ROW_SUMS[op.loss].native)
    return _decomposed.pointwise(_route.LOSSES[op.loss].native)


def _is_float(given: Any) -> bool:
    return isinstance(given, Tensor) and given.is_floating_point()


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results or [])


def _copy(given: Any) -> Any:
    plain = isinstance(given, Tensor) and given.layout == torch.strided and not (given.is_meta or given.is_nested)
    plain = plain and not given.is_quantized
    return given.detach().clone() if plain and not given._is_zerotensor() else None


def _same(given: Tensor, before: Tensor | None) -> bool:
    if before is None:
        return True
    if given.dtype.itemsize == 1:
        return torch.equal(given.view(torch.uint8), before.view(torch.uint8))
    return torch.equal(torch.nan_to_num(given.detach()), torch.nan_to_num(before))


if __name__ == "__main__":
    sys.exit(main(problems))
