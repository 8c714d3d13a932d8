"""Calls that no program should make: an error, torch's where torch has one; never a crash or other numbers."""

import pytest
import torch
import torch.nn.functional as F
from compare import outcome
from losses import ONE_OF_EACH, SOFTMAX, each_of, extension, traits
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss
import fusedloss.functional as L

OPS = torch.ops.fusedloss
OVERLAP = "refer to a single memory location"
ROWS = [loss for loss in SOFTMAX if loss in ONE_OF_EACH]


# ---- the raw ops that overwrite a tensor


def in_place_calls(data: Tensor, loss):
    """Every raw op that may overwrite `data` (4, 5), of one softmax loss."""
    x, y = loss.data((4, 5), torch.float32)
    call = (y, None)
    middle = (1, -100, list(loss.params))
    statistics = getattr(OPS, loss.op)(x, *call, *middle)[2]
    upstream = torch.tensor(2.0)
    calls = {
        "scale_": lambda: OPS.scale_(data, upstream),
        "backward_": lambda: getattr(OPS, f"{loss.op}_backward_")(upstream, None, data, *call, statistics, *middle),
    }
    if traits(loss.op).reads_row:
        calls["with_grad_"] = lambda: getattr(OPS, f"{loss.op}_with_grad_")(data, *call, *middle)
    return calls.items()


@needs_extension
@each_of(ROWS)
def test_no_op_overwrites_a_view_that_is_no_memory_of_its_own(loss):
    x = torch.randn(4, 5)
    hostile = {
        "negated view": torch._neg_view(x),
        "ZeroTensors are immutable": torch._efficientzerotensor((4, 5)),
        "more than one element of the written-to tensor": x[:1].expand(4, 5),
    }
    for message, data in hostile.items():
        for _, call in in_place_calls(data, loss):
            with pytest.raises(RuntimeError, match=message):
                call()
            with torch.inference_mode(), pytest.raises(RuntimeError, match=message):
                call()
    assert x._version == 0


@needs_extension
@each_of(ROWS)
def test_an_op_that_overwrites_counts_as_a_change_and_has_no_derivative(loss):
    for name, call in in_place_calls(data := torch.randn(4, 5), loss):
        before = data._version
        call()
        assert data._version == before + 1, name
    leaf = torch.randn(4, 5, requires_grad=True)
    for message, hostile in {
        "a leaf Variable that requires grad": leaf,
        "a view of a leaf Variable that requires grad": leaf.view(4, 5),
        "is a view": leaf.unbind(0)[0],
        "has no derivative": leaf * 1,
    }.items():
        for _, call in in_place_calls(hostile, loss):
            with pytest.raises(RuntimeError, match=message):
                call()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(4, 5), torch.ones(4, 5))
        for _, call in in_place_calls(dual, loss):
            with pytest.raises(RuntimeError, match="has no derivative"):
                call()
    for _, call in in_place_calls(leaf, loss):
        with torch.no_grad():
            call()
    assert leaf._version == len(in_place_calls(leaf, loss))


@needs_extension
def test_an_overwritten_tensor_is_noticed_by_a_backward_that_reads_it():
    w = torch.randn(4, 5, requires_grad=True)
    square = w.square().sum()
    with torch.no_grad():
        OPS.scale_(w, torch.tensor(3.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


@needs_extension
def test_what_is_only_read_may_be_a_view_of_any_kind():
    data, factor = torch.ones(3), torch._neg_view(torch.tensor(2.0))
    OPS.scale_(data, factor)
    assert torch.equal(data, torch.full((3,), -2.0))
    for upstream in (factor, torch._efficientzerotensor(())):
        for loss in ONE_OF_EACH:
            input, target = loss.data((4, 5), torch.float32)
            value = loss.fused(input.requires_grad_(), target, "mean")
            (found,) = torch.autograd.grad(value, input, upstream)
            value = loss.fused(input, target, "mean")
            (expected,) = torch.autograd.grad(value, input, upstream.clone().resolve_neg())
            assert torch.equal(found, expected)


@needs_extension
def test_scaling_refuses_what_it_would_read_while_it_writes():
    data = torch.ones(6)
    with pytest.raises(RuntimeError, match=OVERLAP):
        OPS.scale_(data, data[1])
    with pytest.raises(RuntimeError, match="expected floating point data"):
        OPS.scale_(torch.ones(3, dtype=torch.complex64), torch.tensor(2.0))


# ---- logits that share their memory with what is read


def shared(dtype=torch.float64):
    """Logits that are no leaf, and the same memory as class indices."""
    logits = torch.zeros(600, 40, dtype=dtype, requires_grad=True) * 1
    return logits, logits.detach().view(torch.int64).view(-1)


@pytest.mark.parametrize("grad_in_forward", [False, True])
@pytest.mark.parametrize("what", ["target", "end", "weight", "probabilities"])
def test_a_gradient_over_its_own_target_or_weight(what, grad_in_forward):
    x, indices = shared()
    target, weight = torch.zeros(600, dtype=torch.int64), None
    if what == "weight":
        weight = x.detach()[0]
    elif what == "probabilities":
        target = x.detach()
    else:
        target = indices[:600] if what == "target" else indices[-600:]
    run = lambda **options: L.cross_entropy(x, target, weight, reduction="sum", **options)  # noqa: E731
    if fusedloss.explain(L.cross_entropy, x, target, weight).startswith("native"):
        pytest.skip("nothing is overwritten natively")
    with pytest.raises(RuntimeError, match=OVERLAP):
        run(inplace=True, grad_in_forward=grad_in_forward)
    assert not x.detach().any() and torch.isfinite(run())


@needs_extension
@each_of(ROWS)
def test_raw_ops_refuse_shared_memory(loss):
    x, target = loss.data((4, 5), torch.float64)
    middle = (1, -100, list(loss.params))
    statistics = getattr(OPS, loss.op)(x, target, None, *middle)[2]
    before = x.clone()
    backward = getattr(OPS, f"{loss.op}_backward_")
    for upstream, weight in [(x.view(-1)[3], None), (torch.tensor(1.0).double(), x[1])]:
        with pytest.raises(RuntimeError, match=OVERLAP):
            backward(upstream, None, x, target, weight, statistics, *middle)
    if traits(loss.op).reads_row:
        with pytest.raises(RuntimeError, match=OVERLAP):
            getattr(OPS, f"{loss.op}_with_grad_")(x, target, x[1], *middle)
    assert torch.equal(x, before)


def test_memory_in_alternation_is_no_overlap():
    both = torch.randn(6, 5, 2, dtype=torch.float64)
    both[..., 1] = both[..., 1].softmax(1)
    leaf = both.clone().requires_grad_()
    expected = torch.autograd.grad(F.cross_entropy(leaf[..., 0], both[..., 1]), leaf)[0]
    pair = leaf * 1
    value = L.cross_entropy(pair[..., 0], pair.detach()[..., 1], inplace=True, grad_in_forward=True)
    torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], expected)


@needs_extension
@on_cpu_alone("numpy shares the CPU's memory alone; test_raw_ops_refuse_shared_memory runs there")
def test_one_memory_in_two_storages():
    numbers = torch.zeros(600, 40, dtype=torch.float64).numpy()
    x, y = torch.from_numpy(numbers), torch.from_numpy(numbers).view(torch.int64).view(-1)[:600]
    expected = OPS.cross_entropy_with_grad(x, y, None, 2, -100, [0.0, 0.0, 0.0])
    loss, _ = OPS.cross_entropy_with_grad_(x, y, None, 2, -100, [0.0, 0.0, 0.0])
    assert torch.equal(loss, expected[0]) and torch.equal(x, expected[2])


def test_a_view_of_a_leaf_is_not_overwritten():
    leaf = torch.randn(4, 5, requires_grad=True)
    if fusedloss.explain(L.cross_entropy, leaf, torch.arange(4)).startswith("native"):
        pytest.skip("nothing is overwritten natively")
    for logits in (leaf, leaf.view(4, 5), leaf[:]):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad is being used in an in-place"):
            L.cross_entropy(logits, torch.arange(4), inplace=True)


@pytest.mark.parametrize("grad_in_forward", [None, False, True])
def test_a_hook_that_raises_finds_the_logits_as_they_were(grad_in_forward):
    x = torch.randn(4, 5, requires_grad=True)
    logits = x * 1
    before = logits.detach().clone()

    def refuse(tensor):
        raise KeyError("refused")

    options = {"inplace": True, "grad_in_forward": grad_in_forward}
    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor), pytest.raises(KeyError):
        L.cross_entropy(logits, torch.arange(4), **options)
    assert torch.equal(logits, before)
    with torch.autograd.graph.save_on_cpu():
        (found,) = torch.autograd.grad(L.cross_entropy(logits, torch.arange(4), **options), x)
    torch.testing.assert_close(found, torch.autograd.grad(F.cross_entropy(x, torch.arange(4)), x)[0])


# ---- sizes beyond what a kernel counts, of tensors that hold one number


@needs_extension
@on_cpu_alone("the line of CUDA in the table of devices is CUDA's; the tests of its kernels know it")
@each_of([loss for loss in ROWS if not loss.soft])
def test_more_classes_than_32_bits_count(loss):
    x = torch.full((1, 1), -1.0).expand(1, 2**31)
    y = torch.tensor([2**31 - 1])
    middle = (1, -100, list(loss.params))
    known = extension.losses[loss.op]
    assert known.run(x, y, None, "mean", -100, *loss.params) is None
    assert known.explain(x, y, None, "mean", -100, *loss.params) == "native: more classes than a kernel counts"
    with pytest.raises(RuntimeError, match="more classes than a kernel counts"):
        getattr(OPS, loss.op)(x, y, None, *middle)


@needs_extension
@on_cpu_alone("a GPU's kernels take as many classes there")
def test_the_last_class_that_32_bits_count():
    x = torch.full((1, 1), -1.0).expand(1, 2**31 - 1)
    assert L.nll_loss(x, torch.tensor([2**31 - 2])) == 1
    with pytest.raises(IndexError, match="out of bounds"):
        L.nll_loss(x, torch.tensor([2**32 + 1]))


@needs_extension
@on_cpu_alone("the line of CUDA in the table of devices is CUDA's; the tests of its kernels know it")
def test_more_classes_of_a_pointwise_loss_than_32_bits_count():
    x = torch.full((1, 1), -1.0).expand(1, 2**31)
    explained = fusedloss.explain(L.sigmoid_focal_loss, x, torch.tensor([3]))
    assert explained == "native: more classes than a kernel counts"
    with pytest.raises(RuntimeError, match="more classes than a kernel counts"):
        OPS.sigmoid_focal(x, torch.tensor([3]), None, 1, [0.25, 2.0], None, False, -100)


@pytest.mark.parametrize("size", [2**40, 2**62])
@each_of(ONE_OF_EACH)
def test_expanded_inputs_that_torch_has_no_memory_for(loss, size):
    if loss.family == "pointwise":
        x, target = torch.full((1,), 0.5).expand(size), torch.ones(1).expand(size)
    elif loss.soft:
        x, target = (torch.ones(1, 1).expand(size // 4, 4) for _ in range(2))
    else:
        x, target = torch.full((1, 1), -1.0).expand(size // 4, 4), torch.zeros(1, dtype=torch.int64).expand(size // 4)
    for reduction in ("mean", "none"):
        with pytest.raises(
            RuntimeError, match="can't allocate memory|Storage size calculation overflowed|out of memory"
        ):
            loss.fused(x, target, reduction)


def test_more_elements_than_torch_counts():
    x, t = torch.zeros(1, 1).expand(2**33, 1), torch.zeros(1, 1).expand(1, 2**33)
    with pytest.warns(UserWarning, match="Using a target size"):
        assert fusedloss.explain(L.mse_loss, x, t).startswith("native: ")
    for ours, torchs in [(L.mse_loss, F.mse_loss), (L.l1_loss, F.l1_loss), (L.huber_loss, F.huber_loss)]:
        assert outcome(lambda: ours(x, t)) == outcome(lambda: torchs(x, t))  # noqa: B023


# ---- arguments of another kind


@needs_extension
@each_of(ONE_OF_EACH)
@pytest.mark.parametrize("reduction", [-1, 4, 7, 257, 2**40])
def test_a_reduction_that_no_loss_has(loss, reduction):
    x, target = loss.data((4, 5), torch.float32)
    for requires_grad in (False, True):
        call = (x.requires_grad_(requires_grad), target, None, reduction)
        with pytest.raises(ValueError, match="expected a reduction from 0"):
            getattr(OPS, loss.op)(*call, *([-100] if loss in SOFTMAX else []), list(loss.params))


@needs_extension
def test_a_mean_or_zero_of_a_pointwise_loss():
    with pytest.raises(ValueError, match=r"expected a reduction from 0 to 2 \(none, mean, sum\), got 3"):
        OPS.mse(torch.ones(3), torch.ones(3), None, 3, [])


@needs_extension
def test_no_second_result_of_a_loss_that_has_none():
    with pytest.raises(RuntimeError, match="no second result"):
        OPS.nll(torch.randn(4, 5), torch.arange(4), None, 1, -100, [], False, True)


@needs_extension
def test_no_loss_at_no_address():
    with pytest.raises(ValueError, match="expected the address of a compiled loss"):
        extension.add_pointwise("nowhere", 0)


def kinds_of(function, *arguments, **options):
    """The type of the error, and what it names."""
    with pytest.raises(Exception) as caught:
        function(*arguments, **options)
    return caught.type


INPUTS = {
    "a list": lambda: [1.0, 2.0],
    "a number": lambda: 1.0,
    "None": lambda: None,
    "sparse": lambda: torch.randn(4, 5).to_sparse(),
    "integers": lambda: torch.ones(4, 5, dtype=torch.int64),
}


@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy"])
def test_inputs_that_are_no_dense_tensor(name, what):
    assert kinds_of(getattr(L, name), INPUTS[what](), torch.arange(4)) == kinds_of(
        getattr(F, name), INPUTS[what](), torch.arange(4)
    )


@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy"])
def test_an_ignore_index_that_is_a_bool(name):
    arguments = (torch.randn(4, 5), torch.arange(4))
    assert outcome(lambda: getattr(L, name)(*arguments, ignore_index=True)) == outcome(
        lambda: getattr(F, name)(*arguments, ignore_index=True)
    )


@needs_extension
def test_class_indices_have_no_gradient_to_another_operand():
    x, y = torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.int64)
    call = (torch.tensor(1.0), x, y, None, 1, [], None, False, -100)
    with pytest.raises(RuntimeError, match="expected targets of the input's shape .* got class indices"):
        OPS.binary_cross_entropy_with_logits_backward(*call, of_target=True)
    third = (torch.tensor(1.0), x, x, None, 1, [0.0], x, False, None)
    with pytest.raises(RuntimeError, match="expected a gradient to one operand, got two"):
        OPS.margin_ranking_backward(*third, of_target=True, of_third=True)
