"""torch's own samples of its losses, OpInfo and ModuleInfo, through torch's own checks, with our functions and modules.

python tests/contract/samples.py [EVERY]    checks every EVERY-th sample, each op once (1: all, some minutes)

A process of its own, because torch.testing._internal sets options of torch and of hypothesis when it is imported.
"""

import copy
import pickle
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import fusedloss
import fusedloss.functional as L

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OF_ROWS = ["cosine_embedding_loss", "triplet_margin_loss", "multi_margin_loss"]
FUNCTIONS = [
    "cross_entropy", "nll_loss", "huber_loss", "smooth_l1_loss", "mse_loss", "l1_loss",
    "binary_cross_entropy_with_logits", "binary_cross_entropy", "hinge_embedding_loss", "soft_margin_loss", "kl_div",
    "poisson_nll_loss", "multilabel_soft_margin_loss", "margin_ranking_loss", "gaussian_nll_loss",
    *OF_ROWS,
]  # fmt: skip
MODULES = [
    nn.CrossEntropyLoss, nn.NLLLoss, nn.HuberLoss, nn.SmoothL1Loss, nn.MSELoss, nn.L1Loss, nn.BCEWithLogitsLoss,
    nn.BCELoss, nn.HingeEmbeddingLoss, nn.SoftMarginLoss, nn.KLDivLoss, nn.PoissonNLLLoss, nn.MultiLabelSoftMarginLoss,
    nn.MarginRankingLoss, nn.GaussianNLLLoss, nn.CosineEmbeddingLoss, nn.TripletMarginLoss, nn.MultiMarginLoss,
]  # fmt: skip
COUNTS: Counter[str] = Counter()
FAILURES: list[str] = []
BELOW_AUTOGRAD = ("_backward", "_with_grad", ".without_second")  # ops that have no derivative of their own
CHECKED: set[str] = set()  # ops
Call = tuple[tuple[Any, ...], dict[str, Any]]


def result_or_error(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except Exception as error:
        return type(error), str(error)


def is_error(result: Any) -> bool:
    return isinstance(result, tuple) and isinstance(result[0], type)


def same(check: str, name: str, torchs: Callable[[], Any], ours: Callable[[], Any]) -> None:
    """The same numbers, up to what a half type rounds, or the same error."""
    COUNTS[check] += 1
    expected, got = result_or_error(torchs), result_or_error(ours)
    if is_error(expected) or is_error(got):
        if not (is_error(expected) and is_error(got) and expected == got):
            FAILURES.append(f"{check}, {name}: expected {expected}, got {got}")
        return
    try:
        torch.testing.assert_close(got, expected, equal_nan=True)
    except AssertionError as error:
        FAILURES.append(f"{check}, {name}: {error}")


def holds(check: str, name: str, torchs: Callable[[], Any], ours: Callable[[], Any]) -> None:
    """What torch's own function passes."""
    COUNTS[check] += 1
    if is_error(got := result_or_error(ours)) and not is_error(result_or_error(torchs)):
        FAILURES.append(f"{check}, {name}: {got}")


def tensors_of(call: Call) -> list[Tensor]:
    return [each for each in (*call[0], *call[1].values()) if isinstance(each, Tensor)]


def of_leaves(function: Callable[..., Tensor], call: Call) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The call as a function of the tensors that require a gradient."""
    args, options = call
    given = [*args, *options.values()]
    places = [i for i, each in enumerate(given) if isinstance(each, Tensor) and each.requires_grad]

    def run(*leaves: Tensor) -> Tensor:
        now = list(given)
        for place, leaf in zip(places, leaves, strict=True):
            now[place] = leaf
        return function(*now[: len(args)], **dict(zip(options, now[len(args) :], strict=True)))

    return run, tuple(given[place] for place in places)


def value_and_grads(function: Callable[..., Tensor], call: Call) -> list[Tensor]:
    run, leaves = of_leaves(function, call)
    value = run(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, torch.full_like(value, 0.75), allow_unused=True)]


# ---- functions


class Ops(TorchDispatchMode):
    """Keeps the calls of fused ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fusedloss" and "scale_" not in str(function):
            kept = [each.detach().clone() if isinstance(each, Tensor) else each for each in args]
            self.calls.append((function, tuple(kept)))
        return function(*args, **(kwargs or {}))


def check_ops(name: str, call: Call, once: bool) -> None:
    with Ops() as ops:
        result_or_error(lambda: value_and_grads(getattr(L, name), call))
    for op, args in ops.calls:
        if once and str(op) in CHECKED:
            continue
        CHECKED.add(str(op))
        if args[0].is_floating_point() and not any(part in str(op) for part in BELOW_AUTOGRAD):
            args[0].requires_grad_()
        holds("opcheck", str(op), lambda: None, lambda op=op, args=args: torch.library.opcheck(op, args))


DERIVATIVES: dict[str, Callable[..., Any]] = {
    "gradcheck": lambda run, leaves: gradcheck(run, leaves, fast_mode=True, check_forward_ad=True),
    "gradcheck of batches": lambda run, leaves: gradcheck(run, leaves, check_batched_grad=True),
    "gradcheck of batches, forward": lambda run, leaves: gradcheck(
        run, leaves, check_forward_ad=True, check_backward_ad=False, check_batched_forward_grad=True
    ),
    "gradgradcheck": lambda run, leaves: gradgradcheck(run, leaves, fast_mode=True),
}


def check_derivatives(name: str, call: Call) -> None:
    (torchs, leaves), (ours, _) = of_leaves(getattr(F, name), call), of_leaves(getattr(L, name), call)
    for check, run in DERIVATIVES.items():
        if leaves and ("batches" not in check or leaves[0].numel() <= 100):
            holds(check, name, lambda run=run: run(torchs, leaves), lambda run=run: run(ours, leaves))


def check_vmap(name: str, call: Call) -> None:
    (x, t, *args), options = call
    for dims in ((0, 0), (-1, 0), (0, None), (None, 0)):
        stacked = [each if d is None else torch.stack([each, each], d) for each, d in zip((x, t), dims, strict=True)]

        def mapped(functions: Any, dims: Any = dims, stacked: Any = stacked) -> Any:
            call_it = lambda x, t: getattr(functions, name)(x, t, *args, **options)  # noqa: E731
            slopes = torch.func.vmap(torch.func.grad(lambda x, t: call_it(x, t).sum()), dims)(*stacked)
            return torch.func.vmap(call_it, dims)(*stacked), slopes

        same("vmap", f"{name} {dims}", lambda mapped=mapped: mapped(F), lambda mapped=mapped: mapped(L))


def without_gradient(each: Any) -> Any:
    return each.detach() if isinstance(each, Tensor) else each


def every(number: int, of: Iterator[Any]) -> Iterator[Any]:
    return (each for i, each in enumerate(of) if i % number == 0)


def check_function(name: str, info: Any, number: int) -> None:
    for dtype in FLOATS:
        for sample in every(number, info.sample_inputs("cpu", dtype, requires_grad=True)):
            call = ((sample.input, *sample.args), sample.kwargs)
            apart = sample.noncontiguous()
            other = ((apart.input, *apart.args), apart.kwargs)
            runs = [lambda c=c: value_and_grads(getattr(L, name), c) for c in (call, other)]
            # Columns that lie apart run natively, and torch rounds each step of a half type.
            if dtype in (torch.float32, torch.float64) or name not in OF_ROWS:
                same("not contiguous", f"{name} {dtype}", *runs)
            check_ops(name, call, once=number > 1)
            if dtype == torch.float64:
                check_derivatives(name, call)
            if dtype == torch.float32:
                check_vmap(name, (tuple(map(without_gradient, call[0])), call[1]))
            if dtype in (torch.float32, torch.float64):
                same(
                    "values",
                    f"{name} {dtype}",
                    *[lambda f=f, c=call: value_and_grads(getattr(f, name), c) for f in (F, L)],
                )
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
        for sample in every(number, iter(result_or_error(lambda d=dtype: list(info.sample_inputs("cpu", d))))):
            if not isinstance(sample, type | str):
                runs = [lambda f=f, s=sample: getattr(f, name)(s.input, *s.args, **s.kwargs).detach() for f in (F, L)]
                same("other dtypes", f"{name} {dtype}", *runs)
    for each in info.error_inputs("cpu") if info.error_inputs_func else ():
        sample = each.sample_input
        same("errors", name, *[lambda f=f, s=sample: getattr(f, name)(s.input, *s.args, **s.kwargs) for f in (F, L)])


# ---- modules

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "forward": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "eval": lambda module: module.eval(),
    "there and back": lambda module: module.half().double(),
    "share_memory": lambda module: module.share_memory(),
}


def check_module(info: Any, number: int) -> None:
    torchs, ours = info.module_cls, getattr(fusedloss, info.module_cls.__name__)
    options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True, "training": True}
    for sample in every(number, iter(info.module_inputs_func(info, **options))):
        made, given = sample.constructor_input, sample.forward_input
        make = lambda of: of(*made.args, **made.kwargs).double()  # noqa: B023, E731
        call = (given.args, given.kwargs)
        for check, copied in COPIES.items():
            runs = [lambda of=of, c=copied: value_and_grads(c(make(of)), call) for of in (torchs, ours)]  # noqa: B023
            same(f"module, {check}", torchs.__name__, *runs)
        (run, leaves), (of_torch, _) = of_leaves(make(ours), call), of_leaves(make(torchs), call)
        for check in ("gradcheck", "gradgradcheck"):
            checked = [lambda r=r, c=check: DERIVATIVES[c](r, leaves) for r in (of_torch, run)]  # noqa: B023
            holds(f"module, {check}", torchs.__name__, *checked)
    for each in info.module_error_inputs_func(info, **options) if info.module_error_inputs_func else ():
        made, given = each.module_error_input.constructor_input, each.module_error_input.forward_input
        runs = [lambda of=of, m=made, g=given: of(*m.args, **m.kwargs)(*g.args, **g.kwargs) for of in (torchs, ours)]
        same("module, errors", torchs.__name__, *runs)


def main(number: int) -> None:
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    random.seed(0)
    ops = {info.name: info for info in op_db if not info.variant_test_name}
    for name in FUNCTIONS:
        check_function(name, ops[f"nn.functional.{name}"], number)
    for info in module_db:
        if info.module_cls in MODULES:
            check_module(info, number)
    for check, count in COUNTS.items():
        print(f"{count:6}  {check}")
    sys.exit("\n".join(FAILURES) or None)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
