"""Under autocast: float32 losses of the logits as they are, as torch's, and no less exact."""

import pytest
import torch
import torch.nn.functional as F
from compare import autocast, error, value_and_grads
from losses import HALVES, REDUCTIONS
from marks import needs_extension
from observe import Recorder, of_any_size
from torch import Tensor

import fusedloss.functional as L

SHAPES = [(6, 5), (40, 300), (2, 21, 50)]


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, class indices, class probabilities and weights, in float64."""
    generator = torch.Generator("cpu").manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

    index = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator, device="cpu")
    index.view(-1)[1::5] = -100
    made = (3 * normal(*shape), index, (2 * normal(*shape)).softmax(1), normal(shape[1]).abs() + 0.1)
    x, index, probabilities, weight = (each.to(torch.get_default_device()) for each in made)
    return x, index, probabilities, weight


# name: how the functions of a namespace are called with (x, index, probabilities, weight), the latter in float32.
CALLS = {
    "index": lambda f, x, y, t, w, r: f.cross_entropy(x, y, reduction=r),
    "smoothing": lambda f, x, y, t, w, r: f.cross_entropy(x, y, reduction=r, label_smoothing=0.1),
    "weight, float32": lambda f, x, y, t, w, r: f.cross_entropy(x, y, w, reduction=r),
    "weight, half": lambda f, x, y, t, w, r: f.cross_entropy(x, y, w.to(x.dtype), reduction=r),
    "weight and smoothing": lambda f, x, y, t, w, r: f.cross_entropy(x, y, w, reduction=r, label_smoothing=0.1),
    "probabilities, float32": lambda f, x, y, t, w, r: f.cross_entropy(x, t, reduction=r),
    "probabilities, half": lambda f, x, y, t, w, r: f.cross_entropy(x, t.to(x.dtype), w, reduction=r),
    "probabilities and smoothing": lambda f, x, y, t, w, r: f.cross_entropy(x, t, reduction=r, label_smoothing=0.1),
    "nll": lambda f, x, y, t, w, r: f.nll_loss(x, y, reduction=r),
    "nll, weight": lambda f, x, y, t, w, r: f.nll_loss(x, y, w, reduction=r),
}


@pytest.mark.thinned
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_float32_loss_no_less_exact_than_torchs(dtype, shape, name, reduction):
    x, index, probabilities, weight = data(shape)
    x, probabilities, weight = x.to(dtype), probabilities.float(), weight.float()
    run = CALLS[name]
    # What the call makes half is half in the exact one too.
    t = probabilities.to(dtype).double() if name == "probabilities, half" else probabilities.double()
    w = weight.to(dtype).double() if name == "weight, half" else weight.double()
    exact, exact_grad = value_and_grads(lambda x: run(F, x, index, t, w, reduction), x.double())
    with autocast(dtype):
        loss, grad = value_and_grads(lambda x: run(L, x, index, probabilities, weight, reduction), x)
        of_torch, grad_of_torch = value_and_grads(lambda x: run(F, x, index, probabilities, weight, reduction), x)
    assert loss.dtype == of_torch.dtype == torch.float32
    assert grad.dtype == grad_of_torch.dtype == dtype
    if loss.device.type == "cpu":  # on a GPU, torch's own are off by a rounding of the half type
        torch.testing.assert_close(loss, of_torch)
        torch.testing.assert_close(grad, grad_of_torch)
    few_steps, hair = 4 * 2**-24, 0.01 * torch.finfo(dtype).eps
    assert error(loss, exact) <= error(of_torch, exact) + few_steps
    assert error(grad, exact_grad) <= error(grad_of_torch, exact_grad) + hair


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_focal_loss(dtype, reduction):
    x, index, probabilities, alpha = data((40, 30))
    for target in (index, probabilities):
        run = lambda x: L.focal_loss(x, target, alpha.to(x.dtype), 1.5, reduction=reduction)  # noqa: B023, E731
        exact, exact_grad = value_and_grads(run, x.to(dtype).double())
        with autocast(dtype):
            loss, grad = value_and_grads(run, x.to(dtype))
        assert loss.dtype == torch.float32 and grad.dtype == dtype
        rounded = torch.finfo(dtype).eps  # of the factors, and of the gradient
        assert error(loss, exact) <= rounded and error(grad, exact_grad) <= 2 * rounded


@needs_extension
@pytest.mark.parametrize("name", [*CALLS, "focal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_they_run_fused(dtype, name):
    x, index, probabilities, weight = data((6, 5))
    x, probabilities, weight = x.to(dtype).requires_grad_(), probabilities.float(), weight.float()
    run = CALLS.get(name, lambda f, x, y, t, w, r: f.focal_loss(x, y, w, reduction=r))
    with autocast(dtype), Recorder() as recorder:
        run(L, x, index, probabilities, weight, "mean")
    ops = [op for op in recorder.seen if op != "aten._to_copy.default"]  # a call's own cast of a weight or target
    expected = "nll" if "nll" in name else "focal" if name == "focal" else "cross_entropy"
    expected = "soft_cross_entropy" if "probabilities" in name else expected
    makes_grad = dtype == torch.bfloat16 and expected != "nll" and x.device.type == "cpu"
    assert ops == [f"fusedloss.{expected}{'_with_grad.default' if makes_grad else '.without_second'}"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if "float32" not in name])
def test_wider_logits_are_left_as_they_are(name, dtype):
    x, index, probabilities, weight = data((6, 5))
    x, probabilities, weight = x.to(dtype), probabilities.to(dtype), weight.to(dtype)
    results = []
    for enabled in (True, False):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=enabled):
            results.append(value_and_grads(lambda x: CALLS[name](L, x, index, probabilities, weight, "mean"), x))
    for one, other in zip(*results, strict=True):
        assert one.dtype == dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"softcap": 3.0}, {"return_lse": True}], ids=str)
def test_options_give_float32_on_either_route(options, dtype):
    x, index, probabilities, _ = data((6, 5))
    x, probabilities = x.to(dtype), probabilities.to(dtype)
    with autocast(dtype):
        for target in (index, probabilities, probabilities.clone().requires_grad_()):  # the last one runs natively
            results = L.cross_entropy(x, target, **options)
            for each in results if isinstance(results, tuple) else (results,):
                assert each.dtype == torch.float32
        assert L.cross_entropy(x, index, **options, out_dtype=dtype) is not None


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_out_dtype_is_heeded(dtype):
    x, index, _, _ = data((6, 5))
    with autocast(dtype):
        assert L.cross_entropy(x.to(dtype), index, out_dtype=dtype).dtype == dtype


@pytest.mark.thinned(1)
@needs_extension
@pytest.mark.parametrize("name", [*CALLS, "focal"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compiled(dtype, name):
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x, index, probabilities, weight = data((6, 5))
    x, probabilities, weight = x.to(dtype), probabilities.float(), weight.float()
    run = CALLS.get(name, lambda f, x, y, t, w, r: f.focal_loss(x, y, w, reduction=r))

    def loss(x: Tensor) -> Tensor:
        return run(L, x, index, probabilities, weight, "mean")

    compiled = of_any_size(torch.compile(loss, backend=aot_autograd(fw_compiler=backend), fullgraph=True))
    with autocast(dtype):
        expected, expected_grad = value_and_grads(loss, x)
        got, grad = value_and_grads(compiled, x)
    assert got.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert any(op.startswith("fusedloss.") and not op.endswith("backward.default") for op in graphs)
