"""What only a GPU can show: values at real sizes, streams, graphs, launches, memory, bad targets in mid-training.

On the executor's device (kernels/executor_device.py) the sizes are small, and what needs a GPU's hardware is left out.
"""

import ctypes
import itertools
from collections.abc import Callable

import pytest
import row_sums_calls
import torch
import torch.nn.functional as F
from compare import EPSILON, largest_error, upstream_of, value_and_grad, value_and_grads
from layouts import laid_out, other_memory
from losses import (
    CROSS_ENTROPY,
    DTYPES,
    GPU,
    INDEXED,
    LOSSES,
    NATIVE,
    ON_EXECUTOR,
    ON_GPU,
    ONE_OF_EACH,
    POINTWISE,
    REDUCTIONS,
    SOFTMAX,
    Loss,
    each_of,
    runs_fused,
)
from observe import compiled_with_ops
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils import cpp_extension

import fusedloss
import fusedloss.functional as L
from fusedloss import custom

pytestmark = pytest.mark.skipif(
    not ON_GPU, reason="no GPU, or no CUDA kernels in the extension; tests/kernels runs the kernels without"
)

CLASS_OPTIONS = [{}, {"grad_in_forward": True}, {"inplace": True}, {"grad_in_forward": True, "inplace": True}]
# Relative to the largest number. A half type is rounded once, and a gradient made in forward once more by the upstream
# gradient; of float64, what it is compared with has as many roundings behind it.
ROUNDINGS = {torch.float32: 48, torch.float64: 200, torch.bfloat16: 2.02, torch.float16: 2.02}
BOUND = {dtype: roundings * EPSILON[dtype] for dtype, roundings in ROUNDINGS.items()}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_row_sum = row_sums_calls.ALL
each_option = pytest.mark.parametrize("options", CLASS_OPTIONS, ids=lambda options: "+".join(options) or "default")


hardware = pytest.mark.hardware(reason="needs a GPU: its streams, graphs, compilers or memory")


@pytest.fixture(autouse=True)
def _on_gpu():
    torch.set_default_device(GPU)
    yield
    torch.set_default_device(None)
    if not ON_EXECUTOR:
        torch.cuda.set_sync_debug_mode("default")
    synchronize()
    fusedloss.check()  # no test leaves a bad target behind


def synchronize() -> None:
    torch.get_device_module(GPU).synchronize()


def needs_free(gigabytes: float) -> None:
    if ON_EXECUTOR:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:g} GB of GPU memory, {free:.1f} GB are free")


def shape_of(loss: Loss) -> tuple[int, ...]:
    rows = 3 if ON_EXECUTOR else 300
    return (rows, 1000) if loss in SOFTMAX else (rows, 1001)


def gradient(loss: Loss, x: Tensor, target: Tensor, reduction: str = "mean") -> tuple[Tensor, Tensor]:
    """Value and gradient of a leaf, as a plain backward gives them: the upstream gradient is 1."""
    value = loss.fused(x, target, reduction)
    return value, torch.autograd.grad(value, x)[0]


def assert_close_to_float64(
    function: Callable[..., Tensor], native: Callable[..., Tensor], x: Tensor, target: Tensor, reduction: str
) -> None:
    value, grad, upstream = value_and_grad(function, x, target, reduction)
    exact_target = target.double() if target.is_floating_point() else target
    exact, exact_grad, _ = value_and_grad(native, x.double().contiguous(), exact_target, reduction, upstream)
    assert value.dtype == grad.dtype == x.dtype
    assert largest_error(value, exact) <= BOUND[x.dtype]
    assert largest_error(grad, exact_grad) <= BOUND[x.dtype]


# ---- values

# Rows for a lane, a warp, a block and several blocks; inner dimensions that vectors divide and that they do not.
SHAPES = [
    (100_003, 10),
    (4001, 33),
    (4000, 1000),
    (333, 4097),
    (70, 50257),
    (20, 128256),
    (2, 21, 64, 64),
    (3, 130, 9, 31),
    (2, 1000, 33),
]
POINTWISE_SHAPES = [(1,), (1000,), (1 << 20,), (1003, 1001)]
if ON_EXECUTOR:
    SHAPES = [(103, 10), (41, 33), (9, 1000), (3, 4097), (1, 50257), (2, 21, 8, 8), (3, 130, 3, 5), (2, 1000, 5)]
    POINTWISE_SHAPES = [(1,), (1000,), (1 << 13,), (13, 1001)]
CASES = [(loss, shape) for loss in ONE_OF_EACH for shape in (SHAPES if loss in SOFTMAX else POINTWISE_SHAPES)]


@each_dtype
@pytest.mark.parametrize("loss, shape", CASES, ids=[f"{loss.name}-{shape}" for loss, shape in CASES])
def test_value_and_gradient_against_float64(loss, shape, dtype):
    x, target = loss.data(shape, dtype)
    for reduction in REDUCTIONS:
        assert runs_fused(loss, x, target, reduction)
        assert_close_to_float64(loss.fused, loss.native, x, target, reduction)


VIEWED = [(65, 1000), (33, 4097), (2, 21, 32, 40), (2, 150, 9, 31)]
if ON_EXECUTOR:
    VIEWED = [(5, 1000), (2, 4097), (2, 21, 4, 8), (2, 150, 3, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", VIEWED, ids=str)
@each_of([loss for loss in ONE_OF_EACH if loss in SOFTMAX])
def test_strided_views(loss, shape, dtype):
    x, target = loss.data(shape, dtype)
    for view in other_memory(x).values():
        assert runs_fused(loss, view, target)
        assert_close_to_float64(loss.fused, loss.native, view, target, "mean")


# Of the rows that stay on the chip: of a warp, of a block, of a cluster, and one too long for any, in double.
KEPT = [(5000, 10), (40_000, 1000), (700, 8193), (300, 50257), (200, 128256), (3, 300_001), (2, 21, 64, 64)]
if ON_EXECUTOR:
    KEPT = [(50, 10), (9, 1000), (2, 8193), (1, 50257), (2, 21, 8, 8)]


@each_dtype
@each_option
@pytest.mark.parametrize("shape", KEPT)
def test_where_the_gradient_is_made(shape, options, dtype):
    needs_free(3)
    x, target = CROSS_ENTROPY.data(shape, dtype)
    weight = torch.rand(shape[1], dtype=torch.float64).to(dtype)
    for reduction in ("mean", "sum"):
        assert_close_to_float64(
            lambda x, y, r: L.cross_entropy(x * 1, y, weight, reduction=r, **options),  # in place needs a non-leaf
            lambda x, y, r: NATIVE["cross_entropy"](x, y, weight.double(), r, -100),
            x,
            target,
            reduction,
        )


@each_dtype
@each_of(LOSSES)
def test_every_path_on_few_rows(loss, dtype):
    """The grid for the sanitizers: small, each kernel in it; what it is compared with runs on the CPU."""
    shapes = [(9, 7), (5, 300), (2, 4099), (1, 40_000), (2, 5, 3, 8), (2, 40, 7)]
    for shape in shapes if loss in SOFTMAX else [(5,), (4099,), (70_001,)]:
        x, target = loss.data(shape, dtype)
        exact_target = target.cpu().double() if target.is_floating_point() else target.cpu()
        calls = [loss.fused]
        if loss is CROSS_ENTROPY:
            calls += [
                lambda x, y, r, o=options: L.cross_entropy(x * 1, y, reduction=r, **o) for options in CLASS_OPTIONS[1:]
            ]
        for call in calls:
            value, grad, upstream = value_and_grad(call, x, target, "mean")
            exact, exact_grad, _ = value_and_grad(loss.native, x.cpu().double(), exact_target, "mean", upstream.cpu())
            assert largest_error(value.cpu(), exact) <= BOUND[dtype]
            assert largest_error(grad.cpu(), exact_grad) <= BOUND[dtype]


@each_dtype
@each_row_sum
def test_losses_of_row_sums(call, dtype):
    """Rows of a warp and of a block, of vectors and of single numbers, and more rows than a grid takes at a time."""
    for rows, columns in [(9, 7), (5, 256), (3, 4099), *[(2, 40_000), (70_001, 16)] * (not ON_EXECUTOR)]:
        # A loss of triplets is a difference of distances, and one of cosines of numbers of about 1.
        of_distance = columns if "norm 1" in call else columns**0.5
        arithmetic = EPSILON[torch.float64 if dtype == torch.float64 else torch.float32]
        # torch subtracts the columns one by one from the gradient of the target's, and is no more exact than ours.
        of_gradient = columns**0.5 if "margins" in call and dtype == torch.float64 else 1.0
        operands, given = row_sums_calls.made(call, (rows,), columns, dtype)
        assert row_sums_calls.fused(call, operands, given)
        exact_given = {name: each.cpu() if isinstance(each, Tensor) else each for name, each in given.items()}
        for reduction in REDUCTIONS:
            got = value_and_grads(row_sums_calls.of(L, call, given, reduction=reduction), *operands)
            native = row_sums_calls.of(F, call, row_sums_calls.double(exact_given), reduction=reduction)
            exact = value_and_grads(native, *(each.cpu().double() for each in operands))
            for one, other, magnitude in zip(got, exact, [of_distance, *[of_gradient] * len(operands)], strict=True):
                lost = 48 * arithmetic * magnitude * (rows if reduction == "sum" else 1)
                assert one.dtype == dtype
                assert largest_error(one.cpu(), other) <= BOUND[dtype] + lost / other.abs().max()


# ---- autograd


@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_backward_twice_and_create_graph(grad_in_forward):
    x, target = CROSS_ENTROPY.data((3 if ON_EXECUTOR else 300, 5000), torch.float32)
    x.requires_grad_()
    value = L.cross_entropy(x, target, grad_in_forward=grad_in_forward)
    (first,) = torch.autograd.grad(value, x, torch.tensor(3.0), retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, x, torch.tensor(2.0), retain_graph=True)
    (third,) = torch.autograd.grad(value, x, torch.tensor(3.0), create_graph=True)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first * (2 / 3))
    torch.testing.assert_close(third, first)
    expected = F.cross_entropy(x, target)
    (expected_grad,) = torch.autograd.grad(expected, x, torch.tensor(3.0), create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad((third**2).sum(), x)[0], torch.autograd.grad((expected_grad**2).sum(), x)[0]
    )


@each_dtype
@each_of(POINTWISE)
def test_a_pointwise_gradient_made_in_forward_serves_any_upstream_gradient(loss, dtype):
    x, target = loss.data((13 if ON_EXECUTOR else 1003, 1001), dtype)
    exact_x = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(loss.native(exact_x, target.double(), "mean"), exact_x)
    x.requires_grad_()
    scale = 32768.0 if dtype == torch.float16 else 1.0  # a mean's gradient alone is below the smallest float16
    value = loss.fused(x, target, "mean")
    for factor in (1.0, 0.75, 1.0):
        upstream = torch.tensor(factor * scale, dtype=dtype)
        (grad,) = torch.autograd.grad(value, x, upstream, retain_graph=True)
        assert largest_error(grad, factor * scale * exact) <= BOUND[dtype]


# ---- where a gradient begins


@each_dtype
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_a_gradient_begins_as_far_behind_16_bytes_as_its_input(loss, reduction, dtype):
    """So that kernels read and write the same vectors; a plain gradient begins at a multiple."""
    x, target = loss.data((3, 301), dtype)
    leaf = laid_out(x, "misaligned").requires_grad_()
    value = loss.fused(leaf, target, reduction)
    upstream = upstream_of(value)
    exact_x = x.double().requires_grad_()
    exact_target = target.double() if target.is_floating_point() else target
    (exact,) = torch.autograd.grad(loss.native(exact_x, exact_target, reduction), exact_x, upstream.double())
    for times in (1, 2):
        value.backward(upstream, retain_graph=True)
        assert leaf.grad is not None and leaf.grad.stride() == x.stride()
        assert largest_error(leaf.grad, times * exact) <= BOUND[dtype]
        if times == 1:  # what autograd adds up lies where it wants
            assert leaf.grad.data_ptr() % 16 == leaf.data_ptr() % 16 == x.element_size() % 16
            assert leaf.grad.untyped_storage().nbytes() < x.nbytes + 16


def test_a_gradient_made_in_forward_begins_as_far_behind_16_bytes_as_its_input():
    x, target = CROSS_ENTROPY.data((3, 301), torch.bfloat16)
    leaf = laid_out(x, "misaligned").requires_grad_()
    (grad,) = torch.autograd.grad(L.cross_entropy(leaf, target, grad_in_forward=True), leaf)
    (expected,) = torch.autograd.grad(L.cross_entropy(x.requires_grad_(), target, grad_in_forward=True), x)
    assert grad.data_ptr() % 16 == leaf.data_ptr() % 16 == 2
    assert torch.equal(grad, expected)


def test_a_gradient_for_a_graph_begins_where_its_fake_kernel_says():
    x, t = POINTWISE[0].data((3, 301), torch.float32)
    ops, upstream = torch.ops.fusedloss, torch.tensor(1.0)
    grad = ops.mse_backward(upstream, laid_out(x, "misaligned"), laid_out(t, "misaligned"), None, 1, [])
    assert grad.storage_offset() == 0 and grad.data_ptr() % 16 == 0
    assert largest_error(grad, (x - t).double() * 2 / x.numel()) <= BOUND[torch.float32]


# ---- streams, graphs, devices


@hardware
@each_option
@pytest.mark.parametrize("shape", [(300, 1000), (7, 50257), (2, 21, 32, 32)])
def test_a_captured_cross_entropy_follows_its_inputs(shape, options):
    loss = Loss(
        "", "softmax", lambda x, y, r: L.cross_entropy(x * 1, y, reduction=r, **options), CROSS_ENTROPY.native, "", ()
    )
    follows_its_inputs(loss, shape)


@hardware
@each_of(ONE_OF_EACH)
def test_a_captured_loss_follows_its_inputs(loss):
    follows_its_inputs(loss, shape_of(loss))


def follows_its_inputs(loss: Loss, shape: tuple[int, ...]) -> None:
    x, target = loss.data(shape, torch.float32, seed=2)
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradient(loss, x, target)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = gradient(loss, x, target)
    for seed in (4, 6):
        new_x, new_target = loss.data(shape, torch.float32, seed)
        with torch.no_grad():
            x.copy_(new_x)
            target.copy_(new_target)
        graph.replay()
        expected, expected_grad = gradient(loss, new_x.requires_grad_(), new_target)
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


@hardware
@each_option
def test_cross_entropy_never_waits_for_the_device(options):
    never_waits(lambda x, y: L.cross_entropy(x * 1, y, **options), *CROSS_ENTROPY.data((300, 1000), torch.float32))


@hardware
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_of(ONE_OF_EACH)
def test_a_loss_never_waits_for_the_device(loss, reduction):
    never_waits(lambda x, t: loss.fused(x, t, reduction).sum(), *loss.data(shape_of(loss), torch.float32))


def never_waits(call: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> None:
    x.requires_grad_()
    torch.autograd.grad(call(x, target), x)  # modules are loaded at their first use, which may wait
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda._sleep(1_000_000_000)  # half a second
    torch.autograd.grad(call(x, target), x)
    done.record()
    assert not done.query()  # torch's mode sees torch's own calls alone
    torch.cuda.set_sync_debug_mode("default")


@hardware
@each_of(ONE_OF_EACH)
def test_runs_on_the_current_stream(loss):
    source, target = loss.data(shape_of(loss), torch.float32)
    expected, expected_grad = gradient(loss, source.clone().requires_grad_(), target)
    x = torch.zeros_like(source)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.copy_(source)  # what runs on another stream reads zeros
        value, grad = gradient(loss, x.requires_grad_(), target)
    side.synchronize()
    assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


@hardware
@each_of(ONE_OF_EACH)
def test_calls_on_several_streams_at_once_keep_their_sums_apart(loss):
    """Calls of a stream share a workspace; streams, graphs and streams that are not torch's have their own."""
    data = [loss.data((4096, 1000) if loss in SOFTMAX else (4_000_001,), torch.float32, seed) for seed in range(5)]
    expected = [loss.fused(x, target, "mean") for x, target in data]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of_graph = loss.fused(*data[4], "mean")
    others = [torch.cuda.Stream() for _ in range(4)]
    streams = [torch.cuda.current_stream(), *others[:2], torch.cuda.ExternalStream(others[2].cuda_stream)]
    torch.cuda.synchronize()
    values = []
    for _ in range(30):
        for stream, (x, target) in zip(streams, data, strict=False):
            with torch.cuda.stream(stream):
                values.append(loss.fused(x, target, "mean"))
        with torch.cuda.stream(others[3]):
            graph.replay()
            values.append(of_graph.clone())
    torch.cuda.synchronize()
    for number, value in enumerate(values):
        assert torch.equal(value, expected[number % 5]), f"call {number // 5} on stream {number % 5}"


@pytest.mark.skipif(torch.get_device_module(GPU).device_count() < 2, reason="one GPU here; the guard needs two")
@each_of(ONE_OF_EACH)
def test_runs_on_the_tensors_device(loss):
    x, target = loss.data(shape_of(loss), torch.float32)
    expected, expected_grad = gradient(loss, x.requires_grad_(), target)
    there = x.detach().to(f"{GPU}:1").requires_grad_()
    value, grad = gradient(loss, there, target.to(f"{GPU}:1"))
    assert torch.get_device_module(GPU).current_device() == 0 and value.device == grad.device == there.device
    torch.testing.assert_close(value.to(f"{GPU}:0"), expected)
    torch.testing.assert_close(grad.to(f"{GPU}:0"), expected_grad)


SIZES = [(4096, 1000), (3, 128256), (2, 21, 300, 400)]
RUNS = [(loss, shape) for loss in ONE_OF_EACH for shape in (SIZES if loss in SOFTMAX else [(10_000_001,)])]


@hardware
@pytest.mark.parametrize("loss, shape", RUNS, ids=[f"{loss.name}-{shape}" for loss, shape in RUNS])
def test_twenty_runs_give_the_same_bits(loss, shape):
    x, target = loss.data(shape, torch.bfloat16)
    x.requires_grad_()
    expected, expected_grad = gradient(loss, x, target)
    for _ in range(19):
        value, grad = gradient(loss, x, target)
        assert torch.equal(value, expected) and torch.equal(grad, expected_grad)


# ---- more than 2^31 elements


def assert_rows_close(rows: list[int], x: Tensor, target: Tensor, losses: Tensor, grad: Tensor, upstream: Tensor):
    """Some rows of (N, C), each against float64."""
    exact_x = x.detach()[rows].double().requires_grad_()
    exact = F.cross_entropy(exact_x, target[rows], reduction="none")
    (exact_grad,) = torch.autograd.grad(exact, exact_x, upstream[rows].double())
    assert largest_error(losses[rows], exact.detach()) <= 1.01 * EPSILON[x.dtype]
    for got, expected in zip(grad[rows], exact_grad, strict=True):
        assert largest_error(got, expected) <= 1.01 * EPSILON[x.dtype]


@hardware
def test_more_logits_than_32_bits_count():
    needs_free(16)
    rows, classes = 70_000, 32_000  # 2.24e9; element 2^31 stands in row 67108
    x = torch.randn(rows, classes, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(classes, (rows,))
    upstream = torch.rand(rows).bfloat16() + 0.5
    losses = L.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(losses, x, upstream)
    some = [0, 1, 33_554, 67_107, 67_108, 67_109, 69_999]
    assert_rows_close(some, x, target, losses.detach(), grad, upstream)
    del grad
    mean = L.cross_entropy(x, target, grad_in_forward=True)
    exact = torch.cat([F.cross_entropy(part.float(), t, reduction="none") for part, t in parts(x, target, 1000)])
    torch.testing.assert_close(mean.double(), exact.double().mean(), rtol=2**-8, atol=0)
    (grad,) = torch.autograd.grad(mean, x)
    ones = torch.full((rows,), 1 / rows, dtype=torch.float64)
    assert_rows_close(some, x, target, losses.detach(), grad, ones)


def parts(x: Tensor, target: Tensor, rows: int):
    return zip(x.detach().split(rows), target.split(rows), strict=True)


@hardware
def test_more_logits_than_32_bits_count_along_the_inner_dimension():
    needs_free(24)
    inner = 1 << 27  # 2.4e9 logits in all, and the classes of a row 256 MB apart
    x = torch.randn(2, 9, inner, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(9, (2, inner))
    upstream = torch.rand(2, inner).bfloat16() + 0.5
    losses = L.cross_entropy(x, target, reduction="none")
    (grad,) = torch.autograd.grad(losses, x, upstream)
    some = [0, 1, inner // 2, inner - 2, inner - 1]
    for batch in (0, 1):
        by_rows = [tensor[batch][:, some].t() for tensor in (x.detach(), grad)]
        row_wise = [tensor[batch][some] for tensor in (target, losses.detach(), upstream)]
        assert_rows_close(list(range(len(some))), by_rows[0], row_wise[0], row_wise[1], by_rows[1], row_wise[2])


@hardware
def test_more_elements_than_32_bits_count():
    needs_free(22)
    count = (1 << 31) + 8
    x = torch.randn(count, dtype=torch.bfloat16).requires_grad_()
    target = torch.randn(count, dtype=torch.bfloat16)
    value, grad = gradient(next(loss for loss in POINTWISE if loss.op == "huber"), x, target, "sum")
    exact = sum(F.huber_loss(a.float(), b.float(), reduction="sum").double() for a, b in parts(x, target, 1 << 26))
    torch.testing.assert_close(value.double(), exact, rtol=2**-8, atol=0)
    for a, b, got in zip(x.detach().split(1 << 26), target.split(1 << 26), grad.split(1 << 26), strict=True):
        assert torch.equal(got, (a.float() - b.float()).clamp(-1, 1).bfloat16())


# ---- bad targets


@pytest.mark.parametrize("bad", [-1, 50, 1 << 40])
@pytest.mark.parametrize("shape", [(64, 50), (2, 50, 32)])
@each_of(INDEXED)
def test_a_bad_target_in_mid_training(loss, shape, bad):
    """Of the 64 rows, number 37 gets a target that is none of 50 classes."""
    torch.manual_seed(0)
    model = nn.Linear(50, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    features = torch.randn(64, 50)
    target = torch.randint(50, (64,))

    def logits() -> Tensor:
        rows = model(features)
        return rows if len(shape) == 2 else rows.view(2, 32, 50).transpose(1, 2)

    def step(target: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss.fused(logits(), target.view(shape[:1] + shape[2:]), "mean")
        value.backward()
        optimizer.step()
        return value.detach()

    before = step(target)
    spoilt, ignored = target.clone(), target.clone()
    spoilt[37], ignored[37] = bad, -100
    leaf = logits().detach().requires_grad_()
    value = loss.fused(leaf, spoilt.view(shape[:1] + shape[2:]), "mean")
    (grad,) = torch.autograd.grad(value, leaf)
    synchronize()
    assert value.isnan()
    with pytest.raises(IndexError, match=rf"Target {bad} is out of bounds\. It stood in row 37 .* on {GPU}:0"):
        step(target)
    expected, expected_grad = gradient(loss, leaf, ignored.view(shape[:1] + shape[2:]))
    torch.testing.assert_close(grad, expected_grad)
    row = grad[37] if len(shape) == 2 else grad[1, :, 5]
    assert (row == 0).all() and expected.isfinite()
    assert all(step(target).isfinite() for _ in range(3 if ON_EXECUTOR else 20)) and step(target) < before


@each_option
def test_a_bad_target_harms_no_other_row_whatever_the_options(options):
    x, target = CROSS_ENTROPY.data((64, 5000), torch.float32)
    spoilt, ignored = target.clone(), target.clone()
    spoilt[37], ignored[37] = 5000, -100
    call = lambda x, y, r: L.cross_entropy(x * 1, y, reduction=r, **options)  # noqa: E731
    value, grad, upstream = value_and_grad(call, x, spoilt, "mean")
    synchronize()
    with pytest.raises(IndexError, match="Target 5000 .* row 37"):
        fusedloss.check()
    _, expected, _ = value_and_grad(CROSS_ENTROPY.native, x, ignored, "mean", upstream)
    assert value.isnan() and (grad[37] == 0).all()
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bad_class_of_a_margin_loss_is_told_later(reduction, p):
    x, target = torch.randn(60, 50), torch.randint(50, (60,))
    spoilt = target.clone()
    spoilt[37] = 50
    run = lambda y: value_and_grads(lambda x: L.multi_margin_loss(x, y, p, reduction=reduction), x)  # noqa: E731
    synchronize()
    fusedloss.check()
    value, grad = run(spoilt)
    synchronize()
    with pytest.raises(IndexError, match="Target 50 .* row 37"):
        run(target)
    good_value, good_grad = run(target)
    assert value[37 if value.dim() else ...].isnan() and (grad[37] == 0).all()
    others = torch.arange(60) != 37
    torch.testing.assert_close(grad[others], good_grad[others])
    if value.dim():
        torch.testing.assert_close(value[others], good_value[others])
    fusedloss.check()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_negative_variance_is_told_later(reduction):
    x, t, var = torch.randn(3, 500).unbind()
    good = var.abs() + 0.1
    spoilt = good.clone()
    spoilt[37] = -1
    call = lambda x, v: L.gaussian_nll_loss(x, t, v, reduction=reduction)  # noqa: E731
    synchronize()
    fusedloss.check()
    spoilt_values = [each.detach() for each in value_and_grads(call, x, spoilt)]
    synchronize()
    with pytest.raises(ValueError, match=rf"^var has negative entry/entries\. An earlier call on {GPU}:0"):
        call(x, good)
    expected = value_and_grads(call, x, good)
    for got, right in zip(spoilt_values, expected, strict=True):
        bad = torch.zeros(got.shape, dtype=torch.bool)
        bad[37 if got.dim() else ...] = True
        assert got[bad].isnan().all()
        torch.testing.assert_close(got[~bad], right[~bad])
    fusedloss.check()


def test_check_raises_once():
    x, target = CROSS_ENTROPY.data((4, 10), torch.float32)
    target[2] = 10
    fusedloss.check()
    L.cross_entropy(x, target)
    synchronize()
    with pytest.raises(IndexError, match="Target 10 .* row 2"):
        fusedloss.check()
    fusedloss.check()


# ---- launches and memory


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and memsets that a call puts on the device."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


SMALLEST = [(loss, shape) for loss in ONE_OF_EACH for shape in ([(4, 10), (32, 10)] if loss in SOFTMAX else [(64,)])]


@hardware
@pytest.mark.parametrize("loss, shape", SMALLEST, ids=[f"{loss.name}-{shape}" for loss, shape in SMALLEST])
def test_no_more_launches_than_torch(loss, shape):
    x, target = loss.data(shape, torch.float32)
    x.requires_grad_()
    native = launches(lambda: torch.autograd.grad(loss.native(x, target, "mean"), x))
    if native == 0:
        pytest.skip("the profiler sees no kernels on this machine")
    fused = launches(lambda: torch.autograd.grad(loss.fused(x, target, "mean"), x))
    assert 0 < fused <= native


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's allocator held beyond what it held before; the result of the call counts."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


@hardware
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4096, 50257), (8, 210, 256, 256)], ids=str)
@each_option
def test_peak_memory(shape, options, dtype):
    needs_free(4)
    leaf = torch.randn(shape, dtype=dtype).requires_grad_()
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    logits = leaf if "inplace" not in options else leaf * 1
    peak = peak_bytes(lambda: torch.autograd.grad(L.cross_entropy(logits, target, **options), logits))
    # 8 bytes of statistics a row, two workspaces of 72 KB, and up to 2 MB that the allocator rounds up by.
    few = 16 * target.numel() + (3 << 20)
    if "inplace" in options:
        assert peak <= few < logits.nbytes / 4
    else:
        assert logits.nbytes <= peak <= logits.nbytes + few


@hardware
@each_of([loss for loss in ONE_OF_EACH if loss in POINTWISE])
def test_peak_memory_of_pointwise_losses(loss):
    x, target = torch.randn(1 << 26).requires_grad_(), torch.rand(1 << 26)
    assert x.nbytes <= peak_bytes(lambda: gradient(loss, x, target)) <= x.nbytes + (3 << 20)


# ---- torch around it


@hardware
@each_of(ONE_OF_EACH)
def test_compile_holds_the_fused_ops(loss):
    x, target = loss.data(shape_of(loss), torch.float32)
    x.requires_grad_()
    expected, expected_grad = gradient(loss, x, target)
    compiled, seen = compiled_with_ops(lambda x, t: loss.fused(x, t, "mean"))
    value = compiled(x, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected_grad)
    # A pointwise gradient may be made in forward, so that backward has another op, or one in a wrapper.
    assert any(name.startswith(f"fusedloss.{loss.op}") for name in seen)
    native = ("huber_loss", "_log_softmax", "aten.exp", "aten.sigmoid")
    assert [name for name in seen if any(word in name for word in native)] == []


@hardware
@each_of(ONE_OF_EACH)
def test_compile_with_aot_eager(loss):
    torch._dynamo.reset()
    x, target = loss.data(shape_of(loss), torch.bfloat16)
    x.requires_grad_()
    compiled = torch.compile(lambda x, t: loss.fused(x, t, "mean"), fullgraph=True, backend="aot_eager")
    value = compiled(x, target)
    expected, expected_grad = gradient(loss, x, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected_grad)


@pytest.mark.parametrize("loss_in_autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision_trains_as_with_torch(dtype, loss_in_autocast):
    """Inside autocast the loss is torch's own; outside, it reads the half logits and the gradient scale meets them."""
    features, target = torch.randn(256, 64), torch.randint(100, (256,))
    weights, losses = [], []
    for criterion in (nn.CrossEntropyLoss(), fusedloss.CrossEntropyLoss()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 100))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(GPU, enabled=dtype == torch.float16)
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast(GPU, dtype=dtype):
                logits = model(features)
                assert logits.dtype == dtype
                if loss_in_autocast:
                    value = criterion(logits, target)
            if not loss_in_autocast:
                value = criterion(logits, target)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        assert value.dtype == (torch.float32 if loss_in_autocast else dtype)
        losses.append(value.detach().float())
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=5e-3)


@hardware
def test_a_custom_loss_without_nvcc_runs_natively(monkeypatch):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    loss = fusedloss.pointwise_loss("without_nvcc", "square(x - t) / 3")
    x, t = torch.randn(2, 100).unbind()
    assert fusedloss.explain(loss, x, t) == "native: a loss that was compiled for the CPU alone"
    expected = ((x - t) ** 2 / 3).mean()
    torch.testing.assert_close(loss(x, t), expected)
    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(x, t), expected)


class Compiled(ctypes.Structure):
    """CustomPointwise of csrc/kernels/custom.h."""

    _fields_ = (
        ("version", ctypes.c_int64),
        ("traits", ctypes.c_int64 * 4),
        ("cpu", ctypes.c_void_p),
        ("cuda", ctypes.c_void_p),
        ("cuda_has_kernels", ctypes.c_void_p),
    )


KEPT: list[object] = []  # what a loss points to, for the life of the process
NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_custom_loss_that_was_compiled_for_other_gpus_runs_natively(monkeypatch, has_kernels):
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    of_cpu, ops = custom.library, []

    def for_other_gpus(op: str, *rest: str) -> tuple[int, str]:
        address, why = of_cpu(op, *rest)
        assert address is not None, why
        compiled = Compiled.from_buffer_copy(Compiled.from_address(address))
        assert compiled.cuda is compiled.cuda_has_kernels is None
        launch = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: NO_KERNEL_IMAGE)
        answer = ctypes.CFUNCTYPE(ctypes.c_bool)(lambda: has_kernels)
        compiled.cuda = ctypes.cast(launch, ctypes.c_void_p)
        compiled.cuda_has_kernels = ctypes.cast(answer, ctypes.c_void_p)
        KEPT.extend([compiled, launch, answer])
        ops.append(op)
        return ctypes.addressof(compiled), ""

    monkeypatch.setattr(custom, "library", for_other_gpus)
    divisor = 3 + has_kernels
    loss = fusedloss.pointwise_loss(f"for_other_gpus_{has_kernels}", f"square(x - t) / {divisor}")
    op = getattr(torch.ops.fusedloss, ops[0])
    x, t = torch.randn(2, 100).unbind()
    if has_kernels:
        assert fusedloss.explain(loss, x, t).startswith(f"fused: {GPU}")
        with pytest.raises(RuntimeError, match=f"{NO_KERNEL_IMAGE}|no kernel image"):
            loss(x, t)
        return
    assert fusedloss.explain(loss, x, t) == "native: a loss that was compiled for other GPUs"
    torch.testing.assert_close(loss(x, t), ((x - t) ** 2 / divisor).mean())
    with pytest.raises(RuntimeError, match="got a loss that was compiled for other GPUs"):
        op(x, t, None, 1, [])


@hardware
@pytest.mark.parametrize(
    "expression",
    ["delta * delta * (sqrt(1 + square((x - t) / delta)) - 1)", "log(cosh(x - t))", "delta * tanh(x) * sinh(t)"],
)
@each_dtype
def test_a_custom_loss_runs_its_own_kernels(dtype, expression):
    params = {"delta": 0.7} if "delta" in expression else {}
    loss = fusedloss.pointwise_loss("custom", expression, params=params)
    x, t = torch.randn(2, 300, 1001).to(dtype).unbind()
    assert fusedloss.explain(loss, x, t).startswith("fused: cuda")
    for reduction in REDUCTIONS:
        native = lambda x, t, r: loss._native(x, t, None, r, *params.values())  # noqa: E731
        assert_close_to_float64(lambda x, t, r: loss(x, t, r), native, x, t, reduction)
        assert_close_to_float64(
            lambda x, t, r: loss(x, t[:1].expand_as(x), r), native, x, t[:1].expand_as(x), reduction
        )


@hardware
@each_dtype
def test_a_custom_loss_of_rows_runs_its_own_kernels(dtype):
    params = {"gamma": 2.0, "z": 1e-4}
    loss = fusedloss.softmax_loss("custom_rows", "weight * pow(q, gamma) * ce + z * square(lse)", params=params)
    for shape in ((500, 10), (300, 1001), (7, 60_000), (4, 21, 33)):
        x, y = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1] + shape[2:])
        y.view(-1)[::7] = -100
        assert fusedloss.explain(loss, x, y).startswith("fused: cuda")
        for smoothing, reduction in itertools.product((0.0, 0.1), REDUCTIONS):
            native = lambda x, y, r: loss._native(x, y, None, r, -100, smoothing, *params.values())  # noqa: E731, B023
            fused = lambda x, y, r: loss(x, y, r, label_smoothing=smoothing)  # noqa: E731, B023
            assert_close_to_float64(fused, native, x, y, reduction)


@hardware
def test_a_custom_loss_takes_class_indices_on_a_gpu():
    loss = fusedloss.pointwise_loss("custom_indexed", "2 * t * softplus(-x) + (1 - t) * softplus(x)")
    for shape in ((300, 1001), (4, 21, 33)):
        x, y = torch.randn(shape), torch.randint(-1, shape[1] + 1, shape[:1] + shape[2:])
        y.view(-1)[::7] = -100
        assert fusedloss.explain(loss, x, y, ignore_index=-100).startswith("fused: cuda")
        for reduction in REDUCTIONS:
            native = lambda x, y, r: loss._native(x, y, None, r, ignore_index=-100)  # noqa: E731
            assert_close_to_float64(lambda x, y, r: loss(x, y, r, ignore_index=-100), native, x, y, reduction)
