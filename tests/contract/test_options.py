"""`grad_in_forward` and `inplace` of cross-entropy: other memory, the same results, and errors where they cannot be."""

import pickle

import pytest
import torch
from marks import needs_extension, on_cpu_alone
from observe import Recorder, bytes_allocated, bytes_kept
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fusedloss
import fusedloss.functional as L

OPTIONS = [
    {"grad_in_forward": True},
    {"grad_in_forward": False},
    {"inplace": True},
    {"grad_in_forward": True, "inplace": True},
]
IN_PLACE = OPTIONS[2:]
SHAPES = [(6, 5), (300, 200), (3, 90_000), (2, 21, 6, 7), (4, 7, 300)]


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    target.view(-1)[1::5] = -100
    return torch.randn(shape, dtype=torch.float64).to(dtype), target


def loss_and_grad(
    x: Tensor, target: Tensor, upstream: float, reduction: str = "mean", weight: Tensor | None = None, **options: bool
) -> tuple[Tensor, Tensor]:
    """Through a clone, so that the logits are no leaf."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    logits = leaf.clone(memory_format=torch.preserve_format)
    loss = L.cross_entropy(logits, target, weight, reduction=reduction, **options)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), leaf.grad


@pytest.mark.thinned
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_options_change_no_result(shape, dtype, options):
    x, target = data(shape, dtype)
    weight = torch.rand(shape[1], dtype=torch.float64).to(dtype)
    for reduction in ("mean", "sum", "none"):
        for upstream in (1.0, 0.75):
            for w in (None, weight):
                expected, expected_grad = loss_and_grad(x, target, upstream, reduction, w)
                loss, grad = loss_and_grad(x, target, upstream, reduction, w, **options)
                torch.testing.assert_close(loss, expected)
                torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_any_layout(options):
    x, target = data((2, 21, 6, 7))
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, x], -1)[..., 0],
        torch.stack([x, x], 2)[:, :, 0].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        expected, expected_grad = loss_and_grad(view.contiguous(), target, 1.0)
        loss, grad = loss_and_grad(view, target, 1.0, **options)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_gradcheck():
    # In place it cannot run: it goes backward several times through one graph.
    x, target = data((5, 4), torch.float64)
    x.requires_grad_()
    assert gradcheck(lambda x: L.cross_entropy(x, target, grad_in_forward=True), x)
    assert gradgradcheck(lambda x: L.cross_entropy(x, target, grad_in_forward=True), x)


@needs_extension
@on_cpu_alone("a GPU makes no gradient in forward unasked")
def test_where_the_gradient_is_made_unasked():
    def makes_it_in_forward(dtype: torch.dtype = torch.float32, **options: object) -> bool:
        x, target = data((6, 5), dtype)
        with Recorder() as recorder:
            L.cross_entropy(x.requires_grad_(), target, **options).sum().backward()
        return "fusedloss.cross_entropy_with_grad.default" in recorder.seen

    assert all(makes_it_in_forward(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16))
    assert not makes_it_in_forward(torch.float16) and not makes_it_in_forward(grad_in_forward=False)
    assert not makes_it_in_forward(reduction="none")
    with torch.autograd.graph.save_on_cpu():
        assert not makes_it_in_forward() and makes_it_in_forward(grad_in_forward=True)


@needs_extension
@on_cpu_alone("counts the CPU's allocations")
def test_a_checkpointed_loss_keeps_no_gradient():
    x, target = data((64, 8000))
    leaf = x.requires_grad_()
    expected = loss_and_grad(x.detach(), target, 1.0)[1]
    losses: list[Tensor] = []
    run = lambda: torch.utils.checkpoint.checkpoint(  # noqa: E731
        lambda z: L.cross_entropy(z, target), leaf, use_reentrant=False
    )
    assert bytes_kept(lambda: losses.append(run())) < x.nbytes / 10
    losses[0].backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected)


@needs_extension
def test_a_gradient_made_in_forward_serves_once_and_is_made_again_after():
    x, target = data((40, 30))
    leaf = x.requires_grad_()
    loss = L.cross_entropy(leaf, target, grad_in_forward=True)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), create_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first / 1.5)
    torch.testing.assert_close(third, first)
    assert third.requires_grad


@needs_extension
@pytest.mark.parametrize("options", IN_PLACE, ids=str)
def test_the_gradient_lies_in_the_logits(options):
    x, target = data((40, 30))
    logits = x.clone().requires_grad_() * 1
    before, version = logits.detach().clone(), logits._version
    loss = L.cross_entropy(logits, target, **options)
    assert torch.equal(logits.detach(), before) == ("grad_in_forward" not in options)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert logits._version > version


@needs_extension
@pytest.mark.parametrize("options", IN_PLACE, ids=str)
def test_in_place_is_refused_where_it_would_be_wrong(options):
    x, target = data((40, 30))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"):
        L.cross_entropy(x.clone().requires_grad_(), target, **options)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        L.cross_entropy((x[:1].clone().requires_grad_() * 1).expand(40, 30), target, **options)
    logits = x.clone().requires_grad_() * 1
    loss = L.cross_entropy(logits, target, **options)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, logits, create_graph=True)
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


@needs_extension
@pytest.mark.parametrize("options", IN_PLACE, ids=str)
def test_other_uses_of_overwritten_logits_are_noticed(options):
    x, target = data((40, 30))
    logits = (x.clone().requires_grad_() * 1).exp()  # exp keeps its result for its own backward
    loss = L.cross_entropy(logits, target, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    logits = x.clone().requires_grad_() * 1
    losses = (logits * logits).sum() + L.cross_entropy(logits, target, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.backward()


@needs_extension
def test_a_change_between_a_gradient_in_place_and_backward_is_noticed():
    x, target = data((40, 30))
    logits = x.clone().requires_grad_() * 1
    loss = L.cross_entropy(logits, target, grad_in_forward=True, inplace=True)
    with torch.no_grad():
        logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", IN_PLACE, ids=str)
def test_nothing_is_overwritten_without_a_gradient(options):
    x, target = data((40, 30))
    before = x.clone()
    L.cross_entropy(x, target, **options)
    with torch.no_grad():
        L.cross_entropy(x.requires_grad_(), target, **options)
    assert torch.equal(x.detach(), before)


@needs_extension
@on_cpu_alone("a GPU tells of a bad target at the next call: test_gpu.py::test_a_bad_target_in_mid_training")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_bad_target_leaves_the_logits_alone(options):
    x, target = data((40, 30))
    target[39] = 30
    logits = x.clone().requires_grad_() * 1
    before = logits.detach().clone()
    with pytest.raises(IndexError, match="Target 30 is out of bounds."):
        L.cross_entropy(logits, target, **options)
    assert torch.equal(logits.detach(), before)


@needs_extension
def test_fp16_never_makes_its_gradient_in_forward():
    # A mean over 2^16 rows: the unscaled gradient is below the smallest fp16, the scaled one is not.
    x, target = torch.zeros(1 << 16, 4, dtype=torch.float16), torch.zeros(1 << 16, dtype=torch.long)
    _, grad = loss_and_grad(x, target, 32768.0, grad_in_forward=True)
    torch.testing.assert_close(grad[:, 1], torch.full((1 << 16,), 0.125, dtype=torch.float16))


@needs_extension
@on_cpu_alone("counts the CPU's allocations: test_gpu.py::test_peak_memory counts a GPU's")
def test_training_in_place_needs_memory_for_rows_alone():
    x, target = data((512, 8000))
    leaf = x.requires_grad_()
    for options in IN_PLACE:
        logits = leaf * 1
        train = lambda: torch.autograd.grad(L.cross_entropy(logits, target, **options), logits)  # noqa: B023, E731
        assert bytes_allocated(train) < 64 * 512


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_module_takes_and_keeps_them(options):
    x, target = data((6, 5))
    module = fusedloss.CrossEntropyLoss(ignore_index=-100, **options)
    expected = nn.CrossEntropyLoss()(x, target)
    for each in (module, pickle.loads(pickle.dumps(module))):
        assert each.inplace == options.get("inplace", False)
        assert each.grad_in_forward == options.get("grad_in_forward")
        leaf = x.clone().requires_grad_()
        loss = each(leaf * 1, target)
        loss.backward()
        torch.testing.assert_close(loss, expected)
    assert list(module.state_dict()) == list(nn.CrossEntropyLoss().state_dict())


def test_a_module_pickled_before_the_options_existed_still_works():
    module = fusedloss.CrossEntropyLoss()
    del module.__dict__["grad_in_forward"], module.__dict__["inplace"]
    x, target = data((6, 5))
    torch.testing.assert_close(module(x, target), nn.CrossEntropyLoss()(x, target))


def test_under_torch_compile_they_are_hints_without_effect():
    x, target = data((6, 5))
    compiled = torch.compile(
        lambda logits: L.cross_entropy(logits, target, grad_in_forward=True, inplace=True),
        fullgraph=True,
        backend="aot_eager",
    )
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, loss_and_grad(x, target, 1.0)[1])


@needs_extension
@pytest.mark.parametrize("options", [{}, {"grad_in_forward": True}], ids=str)
def test_compiled_autograd_over_an_eager_loss(options):
    x, target = data((6, 5))
    expected = loss_and_grad(x, target, 1.0)[1]
    leaf = x.clone().requires_grad_()
    loss = L.cross_entropy(leaf * 1, target, **options)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close(leaf.grad, expected)


@needs_extension
def test_the_op_that_scales_a_gradient():
    scale = torch.ops.fusedloss.scale_
    for factor in (1.0, 2.5):
        grad = torch.randn(7)
        expected = grad * factor
        scale(grad, torch.tensor(factor))
        assert torch.equal(grad, expected)
    torch.library.opcheck(scale, (torch.randn(7), torch.tensor(2.0)), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="expected one factor, got 3"):
        scale(torch.randn(3), torch.randn(3))
