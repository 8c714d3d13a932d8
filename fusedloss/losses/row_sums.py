"""Losses of whole rows: cosine embedding, triplets, and the margins between the scores of classes."""

from torch import Tensor
from torch.nn import _reduction as _Reduction
from torch.overrides import has_torch_function_variadic

from .. import _route, _torchs

__all__ = ["cosine_embedding_loss", "multi_margin_loss", "triplet_margin_loss"]

_NO_TENSOR = "a subclass of torch.Tensor, or no tensor"
_REDUCTIONS = ("mean", "sum", "none")  # a tuple, which may be asked for anything


@_route.row_sums("cosine_embedding", operands=2, left="few")
def _cosine_embedding(
    first: Tensor, second: Tensor, third: None, target: Tensor, weight: None, reduction: str, margin: float = 0.0
) -> Tensor:
    return _torchs.cosine_embedding_loss(first, second, target, margin, reduction=reduction)


@_route.row_sums("triplet_margin", operands=3, left="few")
def _triplet_margin(
    first: Tensor, second: Tensor, third: Tensor, target: None, weight: None, reduction: str,
    margin: float = 1.0, p: float = 2.0, eps: float = 1e-6, swap: float = 0.0,
) -> Tensor:  # fmt: skip
    return _torchs.triplet_margin_loss(first, second, third, margin, p, eps, bool(swap), reduction=reduction)


@_route.row_sums("multi_margin", operands=1, left="few")
def _multi_margin(
    first: Tensor, second: None, third: None, target: Tensor, weight: Tensor | None, reduction: str,
    p: float = 1.0, margin: float = 1.0,
) -> Tensor:  # fmt: skip
    return _torchs.multi_margin_loss(first, target, p, margin, weight, reduction=reduction)  # type: ignore[arg-type]


def cosine_embedding_loss(
    input1: Tensor,
    input2: Tensor,
    target: Tensor,
    margin: float = 0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Cosine embedding loss, as :func:`torch.nn.functional.cosine_embedding_loss`.

    .. math:: \ell = \begin{cases} 1 - \cos(x_1, x_2) & y = 1 \\ \max(0, \cos(x_1, x_2) - \mathrm{margin}) & y = -1
        \end{cases}

    A label other than 1 and -1 gives 0, as in torch.

    Args:
        input1: vectors x1, (N, D) or (D). float32, float64, bfloat16 and float16 run fused on the CPU and on CUDA,
            where the numbers of a row lie side by side.
        input2: vectors x2 of the same dtype; of another shape that broadcasts they run natively.
        target: labels y, (N) or a single one, in a floating point or integer dtype.
        margin: any number.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: the numbers of dimensions do not fit, or the shapes do not broadcast.
        ValueError: an unknown ``reduction``.

    >>> x1, x2 = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> cosine_embedding_loss(x1, x2, torch.tensor([1, -1]), margin=0.5)
    tensor(0.2500)
    """
    if has_torch_function_variadic(input1, input2, target) and _route.overrides_apply():
        return _route.overridden(
            cosine_embedding_loss, (input1, input2, target), input1, input2, target,
            margin=margin, size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if not (isinstance(input1, Tensor) and isinstance(input2, Tensor) and isinstance(target, Tensor)):
        _route.tell_native(_NO_TENSOR)
        return _torchs.cosine_embedding_loss(input1, input2, target, margin, reduction=reduction)
    return _cosine_embedding(input1, input2, None, target, None, reduction, margin)


def triplet_margin_loss(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float = 1.0,
    p: float = 2,
    eps: float = 1e-6,
    swap: bool = False,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Triplet margin loss, as :func:`torch.nn.functional.triplet_margin_loss`.

    .. math:: \ell = \max(0, \mathrm{margin} + d(a, p) - d(a, n)), \quad d(x, y) = \lVert x - y + \epsilon \rVert_p

    Args:
        anchor: vectors a, (D), (N, D) or (N, ..., D). float32, float64, bfloat16 and float16 run fused on the CPU and
            on CUDA, where the numbers of a row lie side by side.
        positive: vectors p of the same dtype; of another shape that broadcasts they run natively.
        negative: vectors n, likewise.
        margin: above 0.
        p: the norm; 1 and 2 run fused.
        eps: added to each difference.
        swap: whether the smaller one of d(a, n) and d(p, n) is taken for d(a, n).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: the operands differ in their number of dimensions, or do not broadcast.
        ValueError: a margin of 0 or less, or an unknown ``reduction``.

    >>> a, p, n = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])
    >>> triplet_margin_loss(a, p, n, eps=0.0)
    tensor(4.)
    """
    if has_torch_function_variadic(anchor, positive, negative) and _route.overrides_apply():
        return _route.overridden(
            triplet_margin_loss, (anchor, positive, negative), anchor, positive, negative, margin=margin, p=p, eps=eps,
            swap=swap, size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if reduction not in _REDUCTIONS:  # torch looks at it before the margin
        _route.tell_native("an unusual reduction")
        return _torchs.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    if margin <= 0:
        raise ValueError(f"margin must be greater than 0, got {margin}")
    tensors = isinstance(anchor, Tensor) and isinstance(positive, Tensor) and isinstance(negative, Tensor)
    if not (tensors and isinstance(swap, bool)):
        _route.tell_native("a choice that is no bool" if tensors else _NO_TENSOR)
        return _torchs.triplet_margin_loss(anchor, positive, negative, margin, p, eps, swap, reduction=reduction)
    return _triplet_margin(anchor, positive, negative, None, None, reduction, margin, p, eps, float(swap))


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Multi-class margin loss, as :func:`torch.nn.functional.multi_margin_loss`.

    .. math:: \ell = \frac{w_y}{C} \sum_{c \ne y} \max(0, \mathrm{margin} - x_y + x_c)^p

    Args:
        input: scores x, (N, C) or (C). float32 and float64 run fused on the CPU and on CUDA, where the numbers of a row
            lie side by side; bfloat16 and float16 on CUDA and under autocast, as torch takes them.
        target: classes y, (N) or a single one, int64.
        p: 1 or 2.
        margin: any number.
        weight: of the classes, (C).
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or a class out of range on a CPU.
        ValueError: another ``p``, a weight that is no vector, or an unknown ``reduction``.
        IndexError: a class out of range on a GPU, from the next call or :func:`fusedloss.check`.

    >>> multi_margin_loss(torch.tensor([[0.5, 1.0, -1.0]]), torch.tensor([0]))
    tensor(0.5000)
    """
    if has_torch_function_variadic(input, target, weight) and _route.overrides_apply():
        return _route.overridden(
            multi_margin_loss, (input, target, weight), input, target, p=p, margin=margin, weight=weight,
            size_average=size_average, reduce=reduce, reduction=reduction,
        )  # fmt: skip
    if size_average is not None or reduce is not None:
        reduction = _Reduction.legacy_get_string(size_average, reduce)
    if reduction not in _REDUCTIONS:  # torch looks at it before p and the weight
        _route.tell_native("an unusual reduction")
        return _torchs.multi_margin_loss(input, target, p, margin, weight, reduction=reduction)
    if p != 1 and p != 2:
        raise ValueError("only p == 1 and p == 2 supported")
    if weight is not None and weight.dim() != 1:
        raise ValueError("weight must be one-dimensional")
    if not (isinstance(input, Tensor) and isinstance(target, Tensor)):
        _route.tell_native(_NO_TENSOR)
        return _torchs.multi_margin_loss(input, target, p, margin, weight, reduction=reduction)
    return _multi_margin(input, None, None, target, weight, reduction, p, margin)
