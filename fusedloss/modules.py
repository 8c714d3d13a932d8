"""The losses as modules: subclasses of torch.nn's where it has them, with ``forward`` replaced."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import deprecated  # torch depends on it

from . import functional
from ._asymmetric_module import AsymmetricLoss
from ._divergence_modules import GaussianNLLLoss, KLDivLoss, PoissonNLLLoss
from ._margin_modules import HingeEmbeddingLoss, MarginRankingLoss, MultiLabelSoftMarginLoss, SoftMarginLoss
from ._row_sums_modules import CosineEmbeddingLoss, MultiMarginLoss, TripletMarginLoss
from ._scripted import as_native as _as_native
from .losses._ignored import IgnoreIndex
from .losses._numbers import NUMBERS, checked, factors_of_classes


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """:class:`torch.nn.CrossEntropyLoss`, computed by :func:`fusedloss.functional.cross_entropy`.

    Constructor, buffers, ``state_dict`` and derivatives are torch's. The function explains the keywords that torch does
    not have. A call takes a ``sample_weight`` beside input and target.

    >>> CrossEntropyLoss(ignore_index=0)(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """

    # On the class too, for modules that were pickled without these attributes.
    z_loss: float = 0.0
    softcap: float | None = None
    out_dtype: torch.dtype | None = None
    all_ignored: str = "nan"
    return_lse: bool = False
    grad_in_forward: bool | None = None
    inplace: bool = False

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: IgnoreIndex = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        out_dtype: torch.dtype | None = None,
        all_ignored: str = "nan",
        return_lse: bool = False,
        grad_in_forward: bool | None = None,
        inplace: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)  # type: ignore[arg-type]
        self.z_loss = z_loss
        self.softcap = softcap
        self.out_dtype = out_dtype
        self.all_ignored = all_ignored
        self.return_lse = return_lse
        self.grad_in_forward = grad_in_forward
        self.inplace = inplace

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Any:
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            self.label_smoothing,
            sample_weight=sample_weight,
            z_loss=self.z_loss,
            softcap=self.softcap,
            out_dtype=self.out_dtype,
            all_ignored=self.all_ignored,
            return_lse=self.return_lse,
            grad_in_forward=self.grad_in_forward,
            inplace=self.inplace,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        _check_one_index(self)
        _check_scriptable(self, "z_loss", "softcap", "out_dtype", "all_ignored", "return_lse")
        return _as_native(self, nn.CrossEntropyLoss)


class NLLLoss(nn.NLLLoss):
    """:class:`torch.nn.NLLLoss`, computed by :func:`fusedloss.functional.nll_loss`.

    A call takes a ``sample_weight`` beside input and target.

    >>> NLLLoss()(torch.tensor([[-0.5, -1.0], [-2.0, -0.1]]), torch.tensor([0, 1]))
    tensor(0.3000)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: IgnoreIndex = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction)  # type: ignore[arg-type]

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return functional.nll_loss(
            input,
            target,
            self.weight,
            None,
            self.ignore_index,
            None,
            self.reduction,
            sample_weight=sample_weight,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        _check_one_index(self)
        return _as_native(self, nn.NLLLoss)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # torch warns where its deprecated class is subclassed

    @deprecated("`NLLLoss2d` has been deprecated. Please use `NLLLoss` instead.", category=FutureWarning)
    class NLLLoss2d(NLLLoss, nn.NLLLoss2d):
        """:class:`torch.nn.NLLLoss2d`, which torch deprecates in favour of :class:`NLLLoss`."""

        def __prepare_scriptable__(self) -> nn.Module:
            _check_one_index(self)
            return _as_native(self, nn.NLLLoss2d)


class HuberLoss(nn.HuberLoss):
    """:class:`torch.nn.HuberLoss`, computed by :func:`fusedloss.functional.huber_loss`.

    >>> HuberLoss(delta=0.5)(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(0.8750)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.huber_loss(input, target, self.reduction, self.delta)

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_native(self, nn.HuberLoss)


class MSELoss(nn.MSELoss):
    """:class:`torch.nn.MSELoss`, computed by :func:`fusedloss.functional.mse_loss`.

    >>> MSELoss()(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(4.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(input, target, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_native(self, nn.MSELoss)


class L1Loss(nn.L1Loss):
    """:class:`torch.nn.L1Loss`, computed by :func:`fusedloss.functional.l1_loss`.

    >>> L1Loss()(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(2.)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.l1_loss(input, target, reduction=self.reduction)

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_native(self, nn.L1Loss)


class SmoothL1Loss(nn.SmoothL1Loss):
    """:class:`torch.nn.SmoothL1Loss`, computed by :func:`fusedloss.functional.smooth_l1_loss`.

    >>> SmoothL1Loss(beta=0.5)(torch.tensor([3.0]), torch.tensor([1.0]))
    tensor(1.7500)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)

    def __prepare_scriptable__(self) -> nn.Module:
        return _as_native(self, nn.SmoothL1Loss)


class BCELoss(nn.BCELoss):
    """:class:`torch.nn.BCELoss`, computed by :func:`fusedloss.functional.binary_cross_entropy`.

    Beside an ``ignore_index``, which torch's module does not take, integer targets are class indices.

    >>> BCELoss()(torch.tensor([0.5]), torch.tensor([1.0]))
    tensor(0.6931)
    >>> BCELoss(ignore_index=-100)(torch.tensor([[0.5, 0.5], [0.1, 0.2]]), torch.tensor([1, -100]))
    tensor(0.6931)
    """

    ignore_index: int | None = None  # on the class, for modules that were pickled without it

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        *,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction)
        if ignore_index is not None:  # otherwise the module's attributes are torch's
            self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy(
            input, target, self.weight, reduction=self.reduction, ignore_index=self.ignore_index
        )

    def __prepare_scriptable__(self) -> nn.Module:
        _check_scriptable(self, "ignore_index")
        return _as_native(self, nn.BCELoss)


class BCEWithLogitsLoss(nn.BCEWithLogitsLoss):
    """:class:`torch.nn.BCEWithLogitsLoss`, computed by :func:`fusedloss.functional.binary_cross_entropy_with_logits`.

    Beside an ``ignore_index``, which torch's module does not take, integer targets are class indices, and there may be
    a ``label_smoothing`` of them. ``target_threshold`` is not torch's either.

    >>> BCEWithLogitsLoss(pos_weight=torch.tensor(2.0))(torch.tensor([0.0]), torch.tensor([1.0]))
    tensor(1.3863)
    >>> BCEWithLogitsLoss(ignore_index=-100)(torch.zeros(2, 3), torch.tensor([1, -100]))
    tensor(0.6931)
    """

    # On the class, for modules that were pickled without them.
    ignore_index: int | None = None
    label_smoothing: float = 0.0
    target_threshold: float | None = None

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        pos_weight: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        target_threshold: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, reduce, reduction, pos_weight)
        if ignore_index is not None:  # otherwise the module's attributes are torch's
            self.ignore_index = ignore_index
        if label_smoothing != 0:
            self.label_smoothing = checked("BCEWithLogitsLoss", "label_smoothing", label_smoothing)
        if target_threshold is not None:
            self.target_threshold = checked("BCEWithLogitsLoss", "target_threshold", target_threshold)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            input,
            target,
            self.weight,
            reduction=self.reduction,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            target_threshold=self.target_threshold,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        _check_scriptable(self, "ignore_index", "label_smoothing", "target_threshold")
        return _as_native(self, nn.BCEWithLogitsLoss)


def _check_scriptable(module: nn.Module, *attributes: str) -> None:
    """Raises where the module has more to it than torch's module; the class holds the defaults."""
    for name in attributes:
        if getattr(module, name) != getattr(type(module), name):
            raise RuntimeError(f"TorchScript runs torch's {type(module).__name__}, which knows no {name}")


def _check_one_index(module: nn.Module) -> None:
    if not isinstance(module.ignore_index, int):
        raise RuntimeError(
            f"TorchScript takes an int for the ignore_index of {type(module).__name__}, got {type(module.ignore_index)}"
        )


def _with_floats(module: nn.Module, *attributes: str) -> nn.Module:
    """A copy for TorchScript, which takes no int for a float."""
    copied = type(module).__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for name in attributes:
        if isinstance(getattr(module, name), int):
            setattr(copied, name, float(getattr(module, name)))
    return copied


def _focusing(module: str, gamma: float) -> float:
    if not isinstance(gamma, NUMBERS):
        gamma = checked(module, "gamma", gamma)
    if not gamma >= 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    return gamma


class FocalLoss(nn.Module):
    """Softmax focal loss; see :func:`fusedloss.functional.focal_loss`.

    Args:
        alpha: None, one factor, or C class weights: a tensor, list or tuple, which becomes the buffer ``alpha``.
        gamma: focusing exponent, at least 0.
        ignore_index: class indices of this value or of one of these values count nowhere and get no gradient, or a mask
            of the rows that are ignored.
        reduction: ``"mean"`` (over targets not ignored), ``"sum"`` or ``"none"``.

    A call takes a ``sample_weight`` beside input and target.

    >>> FocalLoss(gamma=0.0)(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor(1.3863)
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | Tensor | None = None,
        gamma: float = 2.0,
        ignore_index: IgnoreIndex = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        gamma = _focusing("FocalLoss", gamma)
        if isinstance(alpha, list | tuple):
            alpha = factors_of_classes("FocalLoss", "alpha", alpha, dtype=torch.get_default_dtype())
        if isinstance(alpha, Tensor):
            self.register_buffer("alpha", alpha)
        else:
            self.alpha = alpha if alpha is None else checked("FocalLoss", "alpha", alpha)
        self.gamma = gamma
        self.ignore_index = ignore_index
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        return functional.focal_loss(
            input,
            target,
            self.alpha,
            self.gamma,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            sample_weight=sample_weight,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        _check_one_index(self)
        return _with_floats(self, "alpha", "gamma")

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SigmoidFocalLoss(nn.Module):
    """Sigmoid focal loss; see :func:`fusedloss.functional.sigmoid_focal_loss`.

    Args:
        alpha: weight of the positive class; negative for none.
        gamma: focusing exponent, at least 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight: a factor that broadcasts to the inputs, such as one for each class; it becomes the buffer ``weight``.
        ignore_index: class indices of this value count nowhere and get no gradient.

    A call takes targets of the inputs' shape or class indices. It also takes a ``normalizer``, which the mean divides
    by, because that number changes from step to step.

    >>> SigmoidFocalLoss(reduction="sum")(torch.zeros(2), torch.tensor([1.0, 0.0]))
    tensor(0.1733)
    >>> SigmoidFocalLoss()(torch.zeros(3, 2), torch.tensor([1, 2, -100]), normalizer=1)
    tensor(0.4332)
    """

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        gamma = _focusing("SigmoidFocalLoss", gamma)
        self.alpha = checked("SigmoidFocalLoss", "alpha", alpha)
        self.gamma = gamma
        self.reduction = reduction
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index

    def forward(self, inputs: Tensor, targets: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return functional.sigmoid_focal_loss(
            inputs,
            targets,
            self.alpha,
            self.gamma,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return _with_floats(self, "alpha", "gamma")

    def extra_repr(self) -> str:
        ignored = "" if self.ignore_index == -100 else f", ignore_index={self.ignore_index}"
        return f"alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}{ignored}"


__all__ = [
    "AsymmetricLoss",
    "BCELoss",
    "BCEWithLogitsLoss",
    "CosineEmbeddingLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "GaussianNLLLoss",
    "HingeEmbeddingLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "MarginRankingLoss",
    "MSELoss",
    "MultiLabelSoftMarginLoss",
    "MultiMarginLoss",
    "NLLLoss",
    "NLLLoss2d",
    "PoissonNLLLoss",
    "SigmoidFocalLoss",
    "SmoothL1Loss",
    "SoftMarginLoss",
    "TripletMarginLoss",
]
