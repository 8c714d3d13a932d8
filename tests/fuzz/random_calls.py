"""Calls of the raw ops: right ones, drawn by the names in an op's schema, and mistakes put into them."""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedloss import _route
from fusedloss._library import extension

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FAMILIES = {} if extension is None else {name: loss.family for name, loss in extension.losses.items()}
LOSSES = {**_route.LOSSES, **_route.ROW_SUMS}


class Op(NamedTuple):
    call: Any  # the overload
    loss: str  # "huber"; "" of scale_
    kind: str  # "", "_backward", ".carrying", ...

    @property
    def name(self) -> str:
        return f"{self.loss}{self.kind}"

    @property
    def of_forward(self) -> bool:
        """Whether it makes a gradient in forward."""
        return "with_grad" in self.kind or self.kind == ".carrying"


def ops() -> list[Op]:
    """Every raw op of the built-in losses of one operand family, and of distillation."""
    found = []
    for schema in torch._C._jit_get_all_schemas():
        package, _, name = schema.name.partition("::")
        if package != "fusedloss" or name.startswith(("linear", "custom_", "scale_")):
            continue
        loss = max((each for each in (*FAMILIES, "kl_divergence") if name.startswith(each)), key=len)
        overload = schema.overload_name or "default"
        kind = name.removeprefix(loss) + ("" if overload == "default" else f".{overload}")
        op = Op(getattr(getattr(torch.ops.fusedloss, name), overload), loss, kind)
        if not (loss == "nll" and op.of_forward):  # which would save nothing, and is refused
            found.append(op)
    return sorted(found, key=lambda op: op.name)


def right(op: Op, draw: random.Random) -> dict[str, Any]:
    """Arguments, by name, of a call that the op should own."""
    make = _MAKERS[FAMILIES.get(op.loss, "distillation")]
    maker = make(op.loss, draw)
    while op.of_forward and (maker.dtype == torch.float16 or maker.reduction in (0, "none")):
        maker = make(op.loss, draw)
    for argument in op.call._schema.arguments:  # statistics follow what they are made of
        maker.made[argument.name] = maker.argument(argument.name, op)
    return maker.made


class _Maker:
    """Draws what the arguments of one call have in common: sizes, a dtype, a reduction."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.made: dict[str, Any] = {}
        self.generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
        self.dtype = draw.choice(DTYPES)
        self.rows, self.classes = draw.randint(1, 9), draw.choice((1, 2, 5, 17, 33, 130))
        self.reduction: int | str = draw.randint(0, 2)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def share(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) * 0.9 + 0.05).to(self.dtype)

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.draw.random() < 0.3 else None

    def argument(self, name: str, op: Op) -> Any:
        if name in ("wide", "with_lse", "with_grad", "carrier"):
            return None if name == "carrier" else False
        return getattr(self, name)(op)

    def params(self, op: Op) -> list[float]:
        return [float(each) for each in LOSSES[op.loss].params]


class _Pointwise(_Maker):
    def __init__(self, loss: str, draw: random.Random) -> None:
        super().__init__(draw)
        self.loss, self.traits = _route.LOSSES[loss], extension.losses[loss].traits  # type: ignore[union-attr]
        self.shape = draw.choice([(), (self.classes,), (self.rows, self.classes), (2, self.rows, 3)])
        indexed = self.traits.takes_class_indices and len(self.shape) > 1 and draw.random() < 0.4
        self.ignored = -100 if indexed else None

    def argument(self, name: str, op: Op) -> Any:
        fixed = {"reduction": self.reduction, "ignore_index": self.ignored, "of_target": False, "of_third": False}
        return fixed[name] if name in fixed else super().argument(name, op)

    def input(self, op: Op) -> Tensor:
        if self.loss.of_probabilities:
            return self.share(*self.shape)
        return self.normal(*self.shape).abs() + 0.1 if self.loss.positive else self.normal(*self.shape)

    def target(self, op: Op) -> Tensor:
        if self.ignored is not None:
            return self.below(self.shape[1], self.shape[0], *self.shape[2:])
        return self.share(*self.shape)

    def weight(self, op: Op) -> Tensor | None:
        return self.maybe(lambda: self.share(*self.shape[-1:]))

    def third(self, op: Op) -> Tensor:
        return self.share(*self.shape)

    def pos_weight(self, op: Op) -> Tensor | None:
        return self.maybe(lambda: self.share(*self.shape)) if self.traits.has_positive_weight else None

    def upstream(self, op: Op) -> Tensor:
        return self.normal(*(() if self.reduction else self.shape))

    def unrounded(self, op: Op) -> bool:
        return self.draw.random() < 0.2


class _Softmax(_Maker):
    def __init__(self, loss: str, draw: random.Random) -> None:
        super().__init__(draw)
        self.loss, self.known = _route.LOSSES[loss], extension.losses[loss]  # type: ignore[union-attr]
        beside = draw.choice([(), (), (3,), (2, 3)])
        self.shape = draw.choice([(self.rows, self.classes, *beside), (self.classes,)])
        self.row_shape = self.shape[:1] + self.shape[2:] if len(self.shape) > 1 else ()
        self.second_result = False

    def argument(self, name: str, op: Op) -> Any:
        fixed = {"reduction": self.reduction, "ignore_index": -100, "second": False, "upstream_second": None}
        return fixed[name] if name in fixed else super().argument(name, op)

    def logits(self, op: Op) -> Tensor:
        return -self.normal(*self.shape).abs() if op.loss == "nll" else 3 * self.normal(*self.shape)

    def target(self, op: Op) -> Tensor:
        if self.loss.soft:
            return self.normal(*self.shape).softmax(min(1, len(self.shape) - 1))
        return self.below(self.classes, *self.row_shape)

    def weight(self, op: Op) -> Tensor | None:
        return self.maybe(lambda: self.share(self.classes))

    def sample_weight(self, op: Op) -> Tensor | None:
        return None

    def statistics(self, op: Op) -> Tensor:
        logits, target, weight = (self.made[name] for name in ("logits", "target", "weight"))
        forward = getattr(torch.ops.fusedloss, op.loss)
        statistics: Tensor = forward(logits, target, weight, self.reduction, -100, self.params(op))[2]
        return statistics

    def upstream(self, op: Op) -> Tensor:
        return self.normal(*(() if self.reduction else self.row_shape))


class _RowSums(_Maker):
    def __init__(self, loss: str, draw: random.Random) -> None:
        super().__init__(draw)
        self.traits = extension.losses[loss].traits  # type: ignore[union-attr]
        if self.traits.takes_class:
            self.dtype = draw.choice(DTYPES[:2])

    def argument(self, name: str, op: Op) -> Any:
        fixed = {"reduction": self.reduction, "of_first": True, "of_second": False, "of_third": False}
        return fixed[name] if name in fixed else super().argument(name, op)

    def first(self, op: Op) -> Tensor:
        return self.normal(self.rows, self.classes)

    def second(self, op: Op) -> Tensor | None:
        return self.first(op) if self.traits.operands > 1 else None

    def third(self, op: Op) -> Tensor | None:
        return self.first(op) if self.traits.operands > 2 else None

    def target(self, op: Op) -> Tensor | None:
        if self.traits.takes_class:
            return self.below(self.classes, self.rows)
        return 2 * self.below(2, self.rows).to(self.dtype) - 1 if self.traits.takes_labels else None

    def weight(self, op: Op) -> Tensor | None:
        return self.maybe(lambda: self.share(self.classes)) if self.traits.takes_class else None

    def upstream(self, op: Op) -> Tensor:
        return self.normal(*(() if self.reduction else (self.rows,)))


class _Pair(_Maker):
    """A student and a teacher."""

    def __init__(self, loss: str, draw: random.Random) -> None:
        super().__init__(draw)
        self.reduction = draw.choice(("none", "sum", "batchmean", "mean"))
        self.named = (draw.choice(("forward", "reverse", "jsd")), draw.choice(("logits", "log_probs")))

    def argument(self, name: str, op: Op) -> Any:
        fixed = {
            "reduction": self.reduction, "ignore_index": -100, "upstream_lse": None, "temperature": 2.0, "beta": 0.3
        }  # fmt: skip
        return fixed[name] if name in fixed else super().argument(name, op)

    def student(self, op: Op) -> Tensor:
        return self.normal(self.rows, self.classes)

    def teacher(self, op: Op) -> Tensor:
        return self.normal(self.rows, self.classes).abs().neg()

    def labels(self, op: Op) -> Tensor | None:
        return self.maybe(lambda: self.below(2, self.rows) * -100)

    def weight(self, op: Op) -> Tensor | None:
        return self.maybe(lambda: self.share(self.rows))

    def statistics(self, op: Op) -> Tensor:
        rows = [self.made.get(name) for name in ("student", "teacher", "labels", "weight")]
        rest = (*self.named, self.reduction, -100, 2.0, 0.3, False, False, False)
        statistics: Tensor = torch.ops.fusedloss.kl_divergence(*rows, *rest)[2]
        return statistics

    def upstream(self, op: Op) -> Tensor:
        return self.normal(*((self.rows,) if self.reduction == "none" else ()))

    def direction(self, op: Op) -> str:
        return self.named[0]

    def teacher_is(self, op: Op) -> str:
        return self.named[1]


# ---- mistakes


def _strided(tensor: Tensor) -> Tensor:
    """The same numbers with every other place between them."""
    return torch.stack([tensor, torch.zeros_like(tensor)], -1)[..., 0]


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.clone(memory_format=torch.contiguous_format).mT if tensor.dim() > 1 else tensor


def _offset(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape) if tensor.numel() else tensor


# Which keep the values, so that the results must stay the same.
LAYOUTS = (_strided, _transposed, _offset)

_BREAKS: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda t, draw: t.to(draw.choice((*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64))),
    lambda t, draw: t[:1].expand(t.shape) if t.dim() else t.expand(3),
    lambda t, draw: t.unsqueeze(draw.randint(0, t.dim())),
    lambda t, draw: t[0] if t.dim() and t.shape[0] else t,
    lambda t, draw: t[:-1] if t.dim() else t,
    lambda t, draw: torch.cat([t, t]) if t.dim() else t,
    lambda t, draw: t[..., :0] if t.dim() else t,
    lambda t, draw: t[:0] if t.dim() else t,
    lambda t, draw: t.to("meta"),
    lambda t, draw: torch._neg_view(t) if t.is_floating_point() else t,
    lambda t, draw: t.to_sparse() if t.dim() else t,
    lambda t, draw: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    lambda t, draw: t.clone().requires_grad_() if t.is_floating_point() else t,
    lambda t, draw: _with_one(t, draw.choice((math.nan, math.inf, -math.inf, -1, 1 << 31, 1 << 40, -100))),
    lambda t, draw: None,
)


_OTHER_DTYPES = (torch.int8, torch.uint16, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)


class Subclass(Tensor):
    """One that overrides nothing."""


def _in_inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


# Tensors of other kinds, for the raw ops, of which torch's functions take some in ways of their own.
FOREIGN: tuple[Callable[[Tensor, random.Random], Any], ...] = (
    lambda t, draw: t.to(draw.choice(_OTHER_DTYPES)),
    lambda t, draw: torch.quantize_per_tensor(t.float(), 0.1, 0, draw.choice((torch.qint8, torch.quint8))),
    lambda t, draw: t.as_subclass(Subclass),
    lambda t, draw: torch.nn.Parameter(t, requires_grad=t.is_floating_point() and draw.random() < 0.5),
    lambda t, draw: t.as_strided(t.shape, [stride * draw.randint(0, 1) for stride in t.stride()]),
    lambda t, draw: t.to_mkldnn() if t.dtype == torch.float32 and t.dim() else t,
    lambda t, draw: t.to_sparse_csr() if t.dim() == 2 else t,
    lambda t, draw: torch.nested.nested_tensor([t, t]) if t.dim() else t,
    lambda t, draw: torch.complex(t.float(), t.float()).conj() if t.is_floating_point() else t,
    lambda t, draw: _in_inference(t),
)


def _with_one(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    if tensor.numel() and (tensor.is_floating_point() or math.isfinite(value)):
        tensor[(0,) * tensor.dim()] = value
    return tensor


def mistaken(argument: Any, draw: random.Random, foreign: bool = False) -> Any:
    """Another value of a similar kind."""
    if isinstance(argument, Tensor):
        return draw.choice(FOREIGN if foreign else _BREAKS)(argument, draw)
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, int):
        return draw.choice((-1, 0, 1, 3, 7, 257, 1 << 40, -(1 << 63)))
    if isinstance(argument, float):
        return draw.choice((-1.0, 0.0, 1e-30, 1e30, math.nan, math.inf))
    if isinstance(argument, list):
        broken = [draw.choice((-1.0, 0.0, math.nan, math.inf, 1e30)) if draw.random() < 0.5 else x for x in argument]
        return draw.choice((broken, [*argument, 1.0], argument[:-1], [0.0] * 9))
    if isinstance(argument, str):
        return draw.choice(("", "none", "sum", "mean", "forward", "probs", "nonsense" * 100))
    return draw.choice((torch.ones(3), torch.zeros(2, 5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)))


_MAKERS: dict[str, Callable[[str, random.Random], _Maker]] = {
    "pointwise": _Pointwise,
    "softmax": _Softmax,
    "row_sums": _RowSums,
    "distillation": _Pair,
}
