"""The linear cross-entropy as a module."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._scripted import as_native
from .losses._ignored import IgnoreIndex

_Base: type[nn.Module] = getattr(nn, "LinearCrossEntropyLoss", nn.Module)  # torch has it from 2.13 on


class LinearCrossEntropyLoss(_Base):  # type: ignore[misc, valid-type]
    """:class:`torch.nn.LinearCrossEntropyLoss`, computed by :func:`fusedloss.functional.linear_cross_entropy`.

    Constructor and ``state_dict`` are torch's, and the function explains the keywords that torch does not have. The
    module owns its head, ``self.linear``; :meth:`from_linear` takes one that is there, such as the head of a language
    model, tied to its embedding or not. A call takes a ``sample_weight`` and a ``normalizer`` beside input and target.

    >>> LinearCrossEntropyLoss(8, 4)(torch.zeros(2, 8), torch.tensor([0, 3]))
    tensor(1.3863, grad_fn=<...>)
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: IgnoreIndex | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> None:
        linear = nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self._set(linear, num_classes, out_features, weight, reduction, ignore_index, label_smoothing, options, more)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        out_features: tuple[int, ...] = (),
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: IgnoreIndex | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        **more: Any,
    ) -> "LinearCrossEntropyLoss":
        """The loss over a head that is there. Its parameters are shared, not copied.

        >>> head = torch.nn.Linear(8, 4)
        >>> LinearCrossEntropyLoss.from_linear(head).linear.weight is head.weight
        True
        """
        positions = math.prod(out_features)
        if positions == 0 or linear.out_features % positions:
            raise ValueError(
                f"expected a head whose {linear.out_features} outputs are classes for each of {out_features} positions"
            )
        loss = cls.__new__(cls)
        classes = linear.out_features // positions
        loss._set(linear, classes, out_features, weight, reduction, ignore_index, label_smoothing, options, more)
        return loss

    def _set(
        self, linear: nn.Linear, num_classes: int, out_features: tuple[int, ...], weight: Tensor | None, reduction: str,
        ignore_index: IgnoreIndex | None, label_smoothing: float, options: Any, more: dict[str, Any],
    ) -> None:  # fmt: skip
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        if unknown := more.keys() - _MORE:
            raise TypeError(f"LinearCrossEntropyLoss got an unexpected keyword argument {min(unknown)!r}")
        nn.Module.__init__(self)
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.linear = linear
        self.options = options
        self.more = more

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        sample_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        sizes = (self.num_classes, *self.out_features)
        bias = self.linear.bias
        return functional.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*sizes, self.linear.in_features),
            target,
            linear_bias=bias if bias is None else bias.reshape(sizes),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            sample_weight=sample_weight,
            normalizer=normalizer,
            **self.more,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        if _Base is nn.Module or self.more or not isinstance(self.ignore_index, int | None):
            raise RuntimeError("TorchScript runs torch's LinearCrossEntropyLoss, which knows none of our keywords")
        native = as_native(self, _Base)
        del native.more
        return native

    def extra_repr(self) -> str:
        parts = {
            "in_features": self.linear.in_features,
            "num_classes": self.num_classes,
            "out_features": self.out_features,
            "bias": self.linear.bias is not None,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
            "options": self.options,
            **self.more,
        }
        return ", ".join(f"{name}={value}" for name, value in parts.items())


_MORE = {
    "z_loss", "softcap", "logit_scale", "shift", "out_dtype", "all_ignored", "return_lse", "return_accuracy",
    "chunk_rows", "grad_in_forward",
}  # fmt: skip
