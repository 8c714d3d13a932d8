"""Losses of one's own with a third operand v: gradients to all three, whatever their shapes and dtypes."""

import copy
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compare import assert_close, same, value_and_grads
from losses import DTYPES, HALVES, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from observe import compiled_with_ops
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils import cpp_extension

import fusedloss
from fusedloss import custom

COMPILER = cpp_extension.get_cxx_compiler().split()[0]
pytestmark = [
    needs_extension,
    on_cpu_alone("compiles for the CPU; test_three_operands.py runs the kernels of three operands on a GPU"),
    pytest.mark.skipif(
        shutil.which(COMPILER) is None, reason="no C++ compiler; test_expression.py covers the formulas"
    ),
    pytest.mark.filterwarnings("ignore:Input #0 requires gradient"),
]
# name: (expression, parameters, the same in plain PyTorch). One of a difference of x and t, and one that is none.
LOSSES: dict[str, tuple[str, dict[str, float], Callable[..., Tensor]]] = {
    "laplace_nll": (
        "log(v + eps) + abs(x - t) / (v + eps)",
        {"eps": 0.1},
        lambda x, t, v, eps: torch.log(v + eps) + (x - t).abs() / (v + eps),
    ),
    "product": ("v * softplus(x) - t * v * x", {}, lambda x, t, v: v * F.softplus(x) - t * v * x),
}
each = pytest.mark.parametrize("name", LOSSES)


def made(name: str) -> Any:
    value, params, _ = LOSSES[name]
    return fusedloss.pointwise_loss(name, value, params=params)


def expected(name: str, x: Tensor, t: Tensor, v: Tensor, reduction: str) -> Tensor:
    _, params, plain = LOSSES[name]
    losses = plain(x, t, v, **params)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def data(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    t, v = (torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), t.to(dtype), v.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each
def test_values_and_three_gradients(name: str, dtype: torch.dtype) -> None:
    loss = made(name)
    for shape in [(1,), (77,), (3, 5001)]:
        operands = data(*shape, dtype=dtype)
        assert fusedloss.explain(loss, *operands).startswith("fused: cpu")
        for reduction in REDUCTIONS:
            got = value_and_grads(lambda *given: loss(*given, reduction), *operands)  # noqa: B023
            wide = [each.double() for each in operands]
            exact = value_and_grads(lambda *given: expected(name, *given, reduction), *wide)  # noqa: B023
            for one, other in zip(got, exact, strict=True):
                assert one.dtype == dtype
                assert_close(one, other, 1.02 if dtype in HALVES else 48)


@each
def test_derivatives_of_every_order(name: str) -> None:
    loss = made(name)
    operands = tuple(each.requires_grad_() for each in data(3, 4))
    for reduction in REDUCTIONS:
        run = lambda *given: loss(*given, reduction)  # noqa: E731, B023
        assert gradcheck(run, operands) and gradgradcheck(run, operands)


@each
def test_a_third_operand_broadcasts_and_weights_multiply(name: str) -> None:
    loss = made(name)
    x, t, v = data(6, 5)
    weight = torch.rand(5, dtype=torch.float64)
    for third in (v[:, :1], v[0], v[:1, :1], v.float(), v.t().contiguous().t()):
        got = value_and_grads(lambda x, t, v: loss(x, t, v, "none", weight), x, t, third)
        exact = value_and_grads(lambda x, t, v: expected(name, x, t, v, "none") * weight, x, t, third)
        same(got, exact)
        assert fusedloss.explain(loss, x, t, third).startswith("fused")


def test_compiled_exported_and_under_transforms() -> None:
    loss = made("laplace_nll")
    operands = data(6, 5)
    compiled, graphs = compiled_with_ops(lambda *given: loss(*given, eps=0.5))
    same(value_and_grads(compiled, *operands), value_and_grads(lambda *given: loss(*given, eps=0.5), *operands))
    assert any("fusedloss.custom_laplace_nll" in target for target in graphs)
    same(torch.export.export(loss, operands).module()(*operands), loss(*operands))
    rows = torch.func.vmap(torch.func.grad(lambda x, t, v: loss(x, t, v, "sum"), argnums=2))(*operands)
    leaf = operands[2].clone().requires_grad_()
    same(rows, torch.autograd.grad(loss(*operands[:2], leaf, "sum"), leaf)[0])


def test_it_is_a_module_that_names_its_third_operand() -> None:
    loss = made("product")
    operands = data(6, 5)
    assert isinstance(loss, custom.PointwiseLoss) and repr(loss).startswith("product(x, t, v) = ")
    assert repr(loss).splitlines()[-1] == f"  d/dv = {loss.grad_third}"
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(other(*operands), loss(*operands))
    for raised, message, call in (
        (TypeError, r"product\(\): argument 'third' must be Tensor, not str", lambda: loss(*operands[:2], "sum")),
        (TypeError, "missing 1 required positional argument: 'third'", lambda: loss(*operands[:2])),
        (TypeError, "product: unknown parameter eps", lambda: loss(*operands, eps=1.0)),
        (ValueError, "avg is not a valid value", lambda: loss(*operands, "avg")),
    ):
        with pytest.raises(raised, match=message):
            call()
    with pytest.raises(ValueError, match="cannot be named third: that is an argument"):
        fusedloss.pointwise_loss("wrong", "v * third * x", params={"third": 1.0})


def test_a_parameter_may_be_called_v(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom, "library", lambda op, source, name: (None, "not compiled"))
    loss = fusedloss.pointwise_loss("of_v", "v * square(x - t)", params={"v": 2.0})
    x, t, _ = data(6, 5)
    same(loss(x, t, v=3.0), 3 * F.mse_loss(x, t))
    assert type(loss) is custom.PointwiseLoss and loss.grad_third is None


def test_the_slope_by_v_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = custom._trees

    def planted(*given: Any) -> Any:
        *trees, by_third = derived(*given)
        return (*trees, trees[0])

    monkeypatch.setattr(custom, "_trees", planted)
    with pytest.raises(ValueError, match=r"wrong: d/dv = .* where a difference of values gives"):
        fusedloss.pointwise_loss("wrong", "v * x + t + sin(v)")
