"""The pointwise losses of random calls: each number no less accurate than torch's, NaN or infinite only where torch's.

The exact result is a float64 formula that loses no digits on the way: softplus where torch subtracts, log1p where it
takes the logarithm of a rounded difference. Beside each number it gives its size, which is what roundings are relative
to: the magnitudes of the terms that it is a sum of, added up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from choices import Choices, one_draw
from compare import EPSILON, places
from hypothesis import given
from layouts import laid_out
from losses import DTYPES, NATIVE, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from pointwise_calls import OF_TWO_DTYPES
from torch import Tensor

import fusedloss
import fusedloss.functional as L
from fusedloss import _route

pytestmark = [
    needs_extension,
    on_cpu_alone("its slack is that of the CPU's sums: test_values.py bounds a GPU's error"),
    pytest.mark.filterwarnings("ignore:Using a target size"),
    pytest.mark.filterwarnings("ignore:reduction"),
]

# What the error of a number may exceed that of torch's by, in rounding steps (half the distance of two numbers) of its
# dtype at its size. In half types both round one float32 result once, and what is left is which way a tie falls. In
# float32 a number is the end of some eight roundings that go either way (gap, exponential, logarithm, product, weight,
# divisor, upstream, sum), where torch's may happen to have cancelled. In float64 the exact formula has some of its own.
SLACK = {torch.float32: 8.0, torch.float64: 12.0, torch.bfloat16: 0.01, torch.float16: 0.01}
LAYOUTS = ["contiguous", "transposed", "sliced", "channels_last", "expanded rows"]
LARGEST = 3000  # elements: more than a tile of either type, and little enough for thousands of calls


@dataclass(frozen=True)
class Recipe:
    """A call in a few numbers, which are what a failure prints."""

    seed: int
    dtype: torch.dtype
    target_dtype: str  # same, float32 or another half
    shape: tuple[int, ...]
    layouts: tuple[str, str]  # of input and target
    broadcast: str  # nothing, or which of both, where the loss allows it
    weight: str
    weight_dtype: str
    pos_weight: str
    reduction: str
    scale: float
    target: str  # between, certain, or nearly certain
    special: str
    rate: float  # of special elements
    param: float
    gamma: float
    upstream: str
    target_grad: bool


def shape(choices: Choices) -> tuple[int, ...]:
    room, sizes = choices.of([1, 12, 150, LARGEST]), []
    for _ in range(choices.between(0, 4)):
        sizes.append(choices.between(1, min(room, 40) if sizes else room))
        room //= sizes[-1]
    return tuple(choices.permuted(sizes))


def recipe(loss: "Loss", choices: Choices) -> Recipe:
    of = choices.of
    return Recipe(
        shape=shape(choices),
        dtype=of(DTYPES),
        target_dtype=of(loss.target_dtypes),
        layouts=(of(LAYOUTS), of(LAYOUTS)),
        broadcast=of(["nothing", "nothing", "input", "target"]) if loss.of_difference or loss.broadcasts else "nothing",
        weight=of(loss.weights),
        weight_dtype=of(loss.weight_dtypes),
        pos_weight=of(loss.pos_weights),
        reduction=of(REDUCTIONS),
        scale=10 ** (choices.between(-30, 20) / 10),
        target=of(["between", "certain", "nearly certain"]),
        special=of(loss.specials),
        rate=of([0.01, 0.3, 1.0]),
        param=of(loss.params),
        gamma=of(loss.gammas),
        upstream=of(["random", "random", "expanded", "one", "a loss scale"]),
        target_grad=of([False, True]),
        seed=choices.between(0, 2**40),
    )


@dataclass(frozen=True)
class Call:
    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    reduction: str
    param: float
    gamma: float


@dataclass(frozen=True)
class Number:
    """Exact numbers, and the sizes of what they are sums of."""

    exact: Tensor
    size: Tensor

    def times(self, factor: Tensor | float) -> "Number":
        return Number(self.exact * factor, self.size * abs(factor))

    def summed(self, shape: torch.Size) -> "Number":
        if self.exact.shape == shape:
            return self
        return Number(self.exact.sum_to_size(shape), self.size.sum_to_size(shape))


def signed(number: Tensor) -> Number:
    return Number(number, number.abs())


@dataclass(frozen=True)
class Loss:
    """`ours` and `torchs` take a call with its input and target; `exact` gives the losses of the elements, and their
    derivatives by input and target."""

    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    exact: Callable[[Tensor, Tensor, Call], tuple[Number, Number, Number | None]]
    specials: list[str]
    target_dtypes: list[str]
    weights: list[str]
    weight_dtypes: list[str]
    params: tuple[float, ...] = (1.0,)
    pos_weights: tuple[str, ...] = ("none",)
    inputs: str = "numbers"  # or positive ones, probabilities, or logits
    of_difference: bool = False
    mean_by_weight: bool = False
    gammas: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 5.5)
    broadcasts: bool = False  # beside losses of a difference
    gives_way: bool = False  # an operand without dimensions, of a loss of a difference
    targets: Callable[[Tensor], Tensor] = lambda t: t  # from numbers between 0 and 1
    target_grad: bool = True


def exact_mse(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    z = x - t
    return signed(z * z), signed(2 * z), signed(-2 * z)


def exact_l1(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    slope = (x > t).double() - (x < t).double()
    return signed((x - t).abs()), signed(slope), signed(-slope)


def exact_smooth_l1(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    if call.param == 0:
        return exact_l1(x, t, call)
    z, beta = (x - t).abs(), call.param
    value = torch.where(z < beta, z / 2 * (z / beta), z - beta / 2)  # z * z / beta is NaN for a beta of infinity
    slope = torch.where(z < beta, (x - t) / beta, (x - t).sign())
    return signed(value), signed(slope), signed(-slope)


def exact_huber(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    z, delta = (x - t).abs(), call.param
    value = torch.where(z <= delta, z * z / 2, delta * (z - delta / 2))
    slope = (x - t).clamp(-delta, delta)
    return signed(value), signed(slope), signed(-slope)


def exact_bce(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    log_x, log_rest = x.log(), (-x).log1p()
    value = -t * log_x.clamp_min(-100) - (1 - t) * log_rest.clamp_min(-100)
    slope = (x - t) / ((1 - x) * x).clamp_min(1e-12)
    return signed(value), signed(slope), Number(log_rest - log_x, -log_rest - log_x)


def softplus(x: Tensor) -> Tensor:
    return x.clamp_min(0) + (-x.abs()).exp().log1p()


def exact_bce_with_logits(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    weight = torch.ones(()) if call.pos_weight is None else call.pos_weight
    of_one, of_zero, wanted, other = softplus(-x), softplus(x), weight.double() * t, 1 - t
    p, q = x.sigmoid(), (-x).sigmoid()
    value = Number(wanted * of_one + other * of_zero, (wanted * of_one).abs() + (other * of_zero).abs())
    slope = Number(other * p - wanted * q, (other * p).abs() + (wanted * q).abs())
    if call.pos_weight is None:
        return value, slope, signed(-x)
    of_one = weight.double() * of_one
    return value, slope, Number(of_one - of_zero, of_one + of_zero)


def exact_focal(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, None]:
    alpha, gamma = call.param, call.gamma
    p, q = x.sigmoid(), (-x).sigmoid()
    ce = t * softplus(-x) + (1 - t) * softplus(x)
    m = p * (1 - t) + q * t
    factor = (alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else torch.ones_like(t)) * m**gamma
    # A power has the roundings of m gamma times, and as the exponential of gamma log m that of the product.
    power = 1 + gamma * torch.where(m > 0, 1 + m.log().abs(), 1)
    by_power = gamma * (1 - 2 * t) * torch.where(m > 0, p * q / m, 0) * ce
    slope = by_power + p * (1 - t) - q * t
    return (
        Number(factor * ce, factor * ce * power),
        Number(factor * slope, factor * power * (by_power.abs() + p * (1 - t) + q * t)),
        None,
    )


def exact_asymmetric(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, None]:
    """With a clip that is the parameter, for gamma_neg the call's and for gamma_pos half of it."""
    p, q, other, clip = x.sigmoid(), (-x).sigmoid(), 1 - t, call.param
    counts = (p > clip).double()
    pm, rest = counts * (p - clip), q + clip
    of_zero = softplus(x) if clip == 0 else counts * torch.where(pm < 0.5, -(-pm).log1p(), -rest.log())
    gamma = call.gamma * (1 - t / 2)
    m, ce = t * q + other * pm, t * softplus(-x) + other * of_zero
    by_m = torch.where(m > 0, (counts * other - t) * p * q / m, 0)
    of_ce, of_one = other * counts * p * (q / rest if clip else 1.0), t * q
    # What rounds p rounds pm, which may be much smaller, and with it m, the power and the logarithm.
    lost = torch.where(m > 0, 1 + other * clip / m.clamp_min(1e-100), 1)
    power = (1 + gamma * torch.where(m > 0, lost + m.log().abs(), 1)) * m**gamma
    size = power * (gamma * ce * by_m.abs() + of_ce + of_one) * lost
    return (
        Number(m**gamma * ce, power * ce * lost),
        Number(m**gamma * (gamma * ce * by_m + of_ce - of_one), size),
        None,
    )


def exact_smoothed(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, None]:
    """Of an off that is half the parameter, and an on that is 1 less that."""
    off, span = call.param / 2, 1 - call.param
    wanted, other, p, q = off + span * t, off + span * (1 - t), x.sigmoid(), (-x).sigmoid()
    value, slope = wanted * softplus(-x) + other * softplus(x), other * p - wanted * q
    return signed(value), Number(slope, other * p + wanted * q), None


def exact_hinge(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, None]:
    x, t = torch.broadcast_tensors(x, t)
    within = call.param - x >= 0
    of_minus_one, of_one = (t != 1) * (call.param - x).clamp_min(0), (t != -1) * x
    size = (t != 1) * within * (abs(call.param) + x.abs()) + of_one.abs()
    return Number(of_minus_one + of_one, size), signed((t != -1).double() - ((t != 1) & within).double()), None


def exact_soft_margin(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, None]:
    # The rounding of t x is one of the softplus relative to the slope, of which a confident score has as much.
    z = t * x
    value, slope, steps = softplus(-z), (-z).sigmoid(), 1 + z.abs()
    return Number(value, torch.where(z > 0, value * steps, value)), Number(-t * slope, (t * slope).abs() * steps), None


def exact_kl_div(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    x, t = torch.broadcast_tensors(x, t)
    log_t = torch.where(t == 0, 0.0, t.log())
    value = Number(t * (log_t - x), t * (log_t.abs() + x.abs()))
    return value, signed(-t), Number(t.log() + 1 - x, t.log().abs() + 1 + x.abs())


def exact_kl_div_log_target(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    x, t = torch.broadcast_tensors(x, t)
    p = t.exp()
    value = Number(p * (t - x), p * (t.abs() + x.abs()))
    return value, signed(-p), Number(p * (t - x + 1), p * (t.abs() + x.abs() + 1))


def stirling(t: Tensor, call: Call) -> tuple[Number, Number]:
    above, log_t = (t > 1).double() * call.gamma, t.clamp_min(1).log()
    value = above * (t * log_t - t + 0.5 * (2 * math.pi * t.clamp_min(1)).log())
    return Number(value, above * (t * log_t + t + 1)), signed(above * (log_t + 0.5 / t.clamp_min(1)))


def exact_poisson_nll(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    x, t = torch.broadcast_tensors(x, t)
    rate, (constant, slope) = x.exp(), stirling(t, call)
    return (
        Number(rate - t * x + constant.exact, rate + (t * x).abs() + constant.size),
        Number(rate - t, rate + t),
        Number(slope.exact - x, slope.size + x.abs()),
    )


def exact_poisson_nll_rate(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    x, t = torch.broadcast_tensors(x, t)
    shifted, (constant, slope) = x + call.param, stirling(t, call)
    log_x = shifted.log()
    # What rounds x + eps is one rounding more of the logarithm's argument.
    return (
        Number(x - t * log_x + constant.exact, x + t * (log_x.abs() + 1) + constant.size),
        Number(1 - t / shifted, 1 + t / shifted),
        Number(slope.exact - log_x, slope.size + log_x.abs() + 1),
    )


def exact_margin_ranking(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    x, t, y = torch.broadcast_tensors(x, t, labels_of(call).double())
    missing = call.param - y * (x - t)
    within = (missing >= 0).double()
    size = abs(call.param) + (x - t).abs()
    return Number(missing.clamp_min(0), size), signed(-y * within), signed(y * within)


def exact_gaussian_nll(x: Tensor, t: Tensor, call: Call) -> tuple[Number, Number, Number]:
    value, slope, _ = of_variance(x, t, third_of(call).double(), call)
    return value, slope, slope.times(-1.0)


def exact_by_variance(var: Tensor, x: Tensor, call: Call) -> tuple[Number, Number, Number]:
    """Of samples of 0."""
    value, slope, of_var = of_variance(x, torch.zeros_like(x), var, call)
    return value, of_var, slope


def of_variance(x: Tensor, t: Tensor, var: Tensor, call: Call) -> tuple[Number, Number, Number]:
    """The value and the slopes by x and the variance."""
    x, t, var = torch.broadcast_tensors(x, t, var)
    z, v, constant = x - t, var.clamp_min(call.param), call.gamma * 0.5 * math.log(2 * math.pi)
    # What rounds the variance or its bound is one rounding of the logarithm's argument.
    value = Number(0.5 * (v.log() + z * z / v) + constant, 0.5 * (v.log().abs() + 1 + z * z / v) + constant)
    of_square = 0.5 * (z / v) ** 2
    return value, signed(z / v), Number(0.5 / v - of_square, 0.5 / v + of_square)


def on_off(call: Call) -> tuple[float, float]:
    return call.param / 2, 1 - call.param / 2


def labels_of(call: Call) -> Tensor:
    """1 or -1, as the third operand is above 1."""
    third = third_of(call)
    return (2 * (third > 1) - 1).to(third.dtype)


def third_of(call: Call) -> Tensor:
    return torch.ones_like(call.input) if call.pos_weight is None else call.pos_weight


def of_as_many_dims(*operands: Tensor) -> list[Tensor]:
    dims = max(each.dim() for each in operands)
    return [each[(None,) * (dims - each.dim())] for each in operands]


DIFFERENCE = ["none", "none", "ties", "equal", "huge", "tiny", "infinite", "nan"]
LOGITS = ["none", "none", "confident", "confident", "huge", "tiny", "infinite", "nan"]
MIXED, SAME = ["same", "same", "float32", "another half"], ["same"]
# torch takes weights of losses of a difference in the input's size alone.
OF_ELEMENTS = ["none", "none", "elements", "some zero", "zero"]
BROADCAST = [*OF_ELEMENTS, "one", "last", "second"]

LOSSES = {
    "mse": Loss(
        lambda x, t, c: L.mse_loss(x, t, reduction=c.reduction, weight=c.weight),
        lambda x, t, c: F.mse_loss(x, t, reduction=c.reduction, weight=c.weight),
        exact_mse,
        DIFFERENCE,
        MIXED if "mse_loss" in OF_TWO_DTYPES else SAME,
        OF_ELEMENTS,
        MIXED,
        of_difference=True,
        mean_by_weight=True,
    ),
    "l1": Loss(
        lambda x, t, c: L.l1_loss(x, t, reduction=c.reduction, weight=c.weight),
        lambda x, t, c: F.l1_loss(x, t, reduction=c.reduction, weight=c.weight),
        exact_l1,
        DIFFERENCE,
        MIXED,
        OF_ELEMENTS,
        MIXED,
        of_difference=True,
        mean_by_weight=True,
    ),
    "smooth_l1": Loss(
        lambda x, t, c: L.smooth_l1_loss(x, t, reduction=c.reduction, beta=c.param),
        lambda x, t, c: F.smooth_l1_loss(x, t, reduction=c.reduction, beta=c.param),
        exact_smooth_l1,
        DIFFERENCE,
        MIXED,
        ["none"],
        SAME,
        params=(1.0, 1.0, 0.5, 0.3, 0.0, 1e-6, 1e30, math.inf),
        of_difference=True,
    ),
    "huber": Loss(
        lambda x, t, c: L.huber_loss(x, t, c.reduction, c.param, c.weight),
        lambda x, t, c: F.huber_loss(x, t, c.reduction, c.param, c.weight),
        exact_huber,
        DIFFERENCE,
        SAME,
        OF_ELEMENTS,
        SAME,
        params=(1.0, 1.0, 0.5, 0.3, 1e-6, 1e30, math.inf),
        of_difference=True,
    ),
    "binary_cross_entropy": Loss(
        lambda x, t, c: L.binary_cross_entropy(x, t, c.weight, reduction=c.reduction),
        lambda x, t, c: F.binary_cross_entropy(x, t, c.weight, reduction=c.reduction),
        exact_bce,
        ["none", "none", "edges", "edges", "tiny"],
        SAME,
        BROADCAST,
        SAME,
        inputs="probabilities",
    ),
    "binary_cross_entropy_with_logits": Loss(
        lambda x, t, c: L.binary_cross_entropy_with_logits(x, t, c.weight, None, None, c.reduction, c.pos_weight),
        lambda x, t, c: F.binary_cross_entropy_with_logits(x, t, c.weight, None, None, c.reduction, c.pos_weight),
        exact_bce_with_logits,
        LOGITS,
        ["same", "same", "float32"],
        BROADCAST,
        MIXED,
        pos_weights=("none", "none", "one", "last", "second", "elements", "zero"),
        inputs="logits",
    ),
    "sigmoid_focal": Loss(
        lambda x, t, c: L.sigmoid_focal_loss(x, t, c.param, c.gamma, c.reduction, weight=c.weight),
        lambda x, t, c: NATIVE["sigmoid_focal"](x, t, c.weight, c.reduction, c.param, c.gamma),
        exact_focal,
        [special for special in LOGITS if special != "infinite"],  # which have a test of their own below
        MIXED,
        BROADCAST,
        MIXED,
        params=(0.25, 0.25, -1.0, 0.5, 0.7, 0.0, 1.0),
        inputs="logits",
        target_grad=False,
    ),
    "asymmetric": Loss(
        lambda x, t, c: L.asymmetric_loss(x, t, c.gamma, c.gamma / 2, c.param, c.reduction, weight=c.weight),
        lambda x, t, c: NATIVE["asymmetric"](x, t, c.weight, c.reduction, c.gamma, c.gamma / 2, c.param),
        exact_asymmetric,
        [special for special in LOGITS if special != "infinite"],
        MIXED,
        BROADCAST,
        MIXED,
        params=(0.05, 0.05, 0.0, 0.2, 1e-4, 1.0),
        inputs="logits",
        target_grad=False,
    ),
    "smoothed_binary_cross_entropy": Loss(
        lambda x, t, c: _route.LOSSES["smoothed_binary_cross_entropy"].routed(x, t, c.weight, c.reduction, *on_off(c)),
        lambda x, t, c: NATIVE["smoothed_binary_cross_entropy"](x, t, c.weight, c.reduction, *on_off(c)),
        exact_smoothed,
        [special for special in LOGITS if special != "infinite"],
        MIXED,
        BROADCAST,
        MIXED,
        params=(0.1, 0.0, 0.5, 1.0),
        inputs="logits",
        target_grad=False,
    ),
    "hinge_embedding": Loss(
        lambda x, t, c: L.hinge_embedding_loss(x, t, c.param, reduction=c.reduction),
        lambda x, t, c: F.hinge_embedding_loss(x, t, c.param, reduction=c.reduction),
        exact_hinge,
        ["none", "none", "ties", "tiny", "nan"],
        MIXED,
        ["none"],
        SAME,
        params=(1.0, 0.5, 0.0, -0.5),
        broadcasts=True,
        targets=lambda t: 2 * (t > 0.5).double() - 1,
        target_grad=False,
    ),
    "soft_margin": Loss(
        lambda x, t, c: L.soft_margin_loss(x, t, reduction=c.reduction),
        lambda x, t, c: F.soft_margin_loss(x, t, reduction=c.reduction),
        exact_soft_margin,
        ["none", "none", "confident", "tiny", "nan"],
        MIXED,
        ["none"],
        SAME,
        inputs="logits",
        targets=lambda t: 2 * (t > 0.5).double() - 1,
        target_grad=False,
    ),
    "kl_div": Loss(
        lambda x, t, c: L.kl_div(x, t, reduction=c.reduction),
        lambda x, t, c: F.kl_div(x, t, reduction=c.reduction),
        exact_kl_div,
        ["none", "none", "tiny", "nan"],
        MIXED,
        ["none"],
        SAME,
        broadcasts=True,
    ),
    "kl_div_log_target": Loss(
        lambda x, t, c: L.kl_div(x, t, reduction=c.reduction, log_target=True),
        lambda x, t, c: F.kl_div(x, t, reduction=c.reduction, log_target=True),
        exact_kl_div_log_target,
        ["none", "none", "tiny", "nan"],
        MIXED,
        ["none"],
        SAME,
        broadcasts=True,
        targets=lambda t: -20 * t,
    ),
    "poisson_nll": Loss(
        lambda x, t, c: L.poisson_nll_loss(x, t, full=c.gamma == 1, reduction=c.reduction),
        lambda x, t, c: F.poisson_nll_loss(x, t, full=c.gamma == 1, reduction=c.reduction),
        exact_poisson_nll,
        ["none", "none", "tiny", "nan"],
        MIXED,
        ["none"],
        SAME,
        gammas=(0.0, 1.0),
        broadcasts=True,
        targets=lambda t: 20 * t,
    ),
    "poisson_nll_rate": Loss(
        lambda x, t, c: L.poisson_nll_loss(x, t, False, c.gamma == 1, eps=c.param, reduction=c.reduction),
        lambda x, t, c: F.poisson_nll_loss(x, t, False, c.gamma == 1, eps=c.param, reduction=c.reduction),
        exact_poisson_nll_rate,
        ["none", "none", "tiny", "nan"],
        MIXED,
        ["none"],
        SAME,
        params=(1e-8, 1e-3, 1.0),
        gammas=(0.0, 1.0),
        inputs="positive numbers",
        broadcasts=True,
        targets=lambda t: 20 * t,
    ),
    "margin_ranking": Loss(
        lambda x, t, c: L.margin_ranking_loss(*of_as_many_dims(x, t, labels_of(c)), c.param, reduction=c.reduction),
        lambda x, t, c: F.margin_ranking_loss(*of_as_many_dims(x, t, labels_of(c)), c.param, reduction=c.reduction),
        exact_margin_ranking,
        ["none", "none", "ties", "equal", "tiny", "nan"],
        MIXED,
        ["none"],
        MIXED,
        params=(0.0, 1.0, 0.5, -0.5),
        pos_weights=("elements",),
        of_difference=True,
    ),
    "gaussian_nll": Loss(
        lambda x, t, c: L.gaussian_nll_loss(x, t, third_of(c), c.gamma == 1, c.param, c.reduction),
        lambda x, t, c: F.gaussian_nll_loss(x, t, third_of(c), c.gamma == 1, c.param, c.reduction),
        exact_gaussian_nll,
        ["none", "none", "equal", "tiny", "nan"],
        MIXED,
        ["none"],
        MIXED,
        params=(1e-6, 1e-3, 0.5),
        pos_weights=("elements", "elements", "zero"),
        of_difference=True,
        gammas=(0.0, 1.0),
        gives_way=True,
    ),
    "gaussian_nll, variance": Loss(
        lambda x, t, c: L.gaussian_nll_loss(t, torch.zeros_like(t), x, c.gamma == 1, c.param, c.reduction),
        lambda x, t, c: F.gaussian_nll_loss(t, torch.zeros_like(t), x, c.gamma == 1, c.param, c.reduction),
        exact_by_variance,
        ["none", "none", "tiny", "nan"],
        ["same", "same", "float32"],
        ["none"],
        SAME,
        params=(1e-6, 1e-3, 0.5),
        gammas=(0.0, 1.0),
        inputs="positive numbers",
        targets=lambda t: 8 * t - 4,
    ),
}


def other_dtype(dtype: torch.dtype, kind: str) -> torch.dtype:
    """Of a target or weight, which leave the result in the input's dtype or make it float32 from a half."""
    if kind == "same":
        return dtype
    if kind == "float32":
        return dtype if dtype == torch.float64 else torch.float32
    return torch.float16 if dtype == torch.bfloat16 else torch.bfloat16


def cooked(loss: Loss, recipe: Recipe) -> Call:
    generator = torch.Generator().manual_seed(recipe.seed)

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def chosen(shape: tuple[int, ...], numbers: list[float]) -> Tensor:
        index = torch.randint(len(numbers), shape, generator=generator)
        return torch.tensor(numbers, dtype=torch.float64)[index]

    def made_special(x: Tensor, dtype: torch.dtype, kind: str) -> Tensor:
        finfo, some = torch.finfo(dtype), uniform(x.shape) < recipe.rate
        # Some way below the largest number, where it depends on the order of the factors what overflows on the way.
        largest = 6e4 if dtype == torch.float16 or loss.inputs == "logits" else finfo.max / 2**20
        edge = recipe.param if math.isfinite(recipe.param) else 1.0
        numbers = {
            "infinite": [math.inf, -math.inf],
            "nan": [math.nan],
            "huge": [largest, -largest, largest / 2],
            "tiny": [finfo.tiny, finfo.smallest_normal / 4, finfo.eps / 2, 0.0],
            "ties": [edge, -edge],
            "edges": [0.0, 1.0, 1 - finfo.eps / 2],
            "confident": [17.0, -17.0, 40.0, -60.0, 88.0, -100.0, 100.0],
        }.get(kind)
        return x if numbers is None else torch.where(some, chosen(x.shape, numbers), x)

    shape, dtype = recipe.shape, recipe.dtype
    of_input = of_target = shape
    if recipe.broadcast != "nothing" and shape:
        smaller = tuple(1 if uniform(()) < 0.5 else size for size in shape)[int(uniform(()) < 0.3) :]
        of_input, of_target = (smaller, shape) if recipe.broadcast == "input" else (shape, smaller)
    gives_way = (loss.broadcasts or loss.gives_way) and (of_input == ()) != (
        of_target == ()
    )  # natively, in torch's dtype
    target_dtype = dtype if gives_way else other_dtype(dtype, recipe.target_dtype)
    x = recipe.scale * torch.randn(of_input, generator=generator, dtype=torch.float64)
    x = x.sigmoid() if loss.inputs == "probabilities" else x.abs() if loss.inputs == "positive numbers" else x
    if loss.of_difference:
        t = recipe.scale * torch.randn(of_target, generator=generator, dtype=torch.float64)
    elif recipe.target == "nearly certain":
        t = (10 * torch.randn(of_target, generator=generator, dtype=torch.float64)).sigmoid()
    else:
        t = uniform(of_target)
        t = t.round() if recipe.target == "certain" else t
    t = loss.targets(t)
    x = made_special(x, dtype, recipe.special)
    if recipe.special == "equal":
        t = (x.to(dtype).to(target_dtype) if of_input == of_target else t * 0 + x.flatten()[0].to(dtype)).double()
    elif recipe.special == "ties":
        t = torch.where(uniform(of_target) < recipe.rate, 0.0, t)
    elif loss.of_difference or recipe.special in ("edges", "tiny"):
        t = made_special(t, target_dtype, recipe.special)
    finite = torch.finfo(dtype).max if recipe.special != "infinite" else math.inf
    x = x.clamp(-finite, finite).to(dtype)
    finite = torch.finfo(target_dtype).max if recipe.special != "infinite" else math.inf
    t = t.clamp(-finite, finite).to(target_dtype)

    def factor(kind: str, dtype: torch.dtype) -> Tensor | None:
        sizes = {"one": (), "last": shape[-1:], "second": (shape[1], *[1] * len(shape[2:])) if shape[1:] else ()}
        made = 2 * uniform(sizes.get(kind, of_input))
        if kind in ("zero", "some zero"):
            made = made * (uniform(made.shape) < (0.0 if kind == "zero" else 0.5))
        return None if kind == "none" else laid_out(made.to(dtype), recipe.layouts[-1])

    # Beside more dimensions, a weight without any leaves torch's dtype alone: contract/test_pointwise_dtypes.py.
    weight_dtype = dtype if of_input == () else other_dtype(dtype, recipe.weight_dtype)
    return Call(
        laid_out(x, recipe.layouts[0]),
        laid_out(t, recipe.layouts[1]),
        factor(recipe.weight, weight_dtype),
        factor(recipe.pos_weight, weight_dtype),
        recipe.reduction,
        recipe.param,
        recipe.gamma,
    )


def upstream_of(recipe: Recipe, value: Tensor) -> Tensor:
    if recipe.upstream == "one":
        return torch.ones_like(value)
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    scale = 4096.0 if recipe.upstream == "a loss scale" else 1.0
    shape = () if recipe.upstream == "expanded" else value.shape
    return (
        (scale * (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5)).to(value.dtype).expand_as(value)
    )


def exact(loss: Loss, call: Call, upstream: Tensor) -> tuple[Number, Number, Number | None]:
    """The result, and the gradients of input and target."""
    value, slope, target_slope = loss.exact(call.input.double(), call.target.double(), call)
    weight = 1.0 if call.weight is None else call.weight.double()
    value = value.times(weight)
    of_element = upstream.double() * weight
    if call.reduction != "none":
        shape = value.exact.shape
        value = value.summed(torch.Size())
        if call.reduction == "mean":
            divisor = torch.tensor(float(shape.numel()), dtype=torch.float64)
            if loss.mean_by_weight and call.weight is not None:
                divisor = call.weight.double().sum()
            value, of_element = value.times(1 / divisor), of_element / divisor
    slopes = slope.times(of_element).summed(call.input.shape)
    return value, slopes, target_slope and target_slope.times(of_element).summed(call.target.shape)


def excess(got: Tensor, of_torch: Tensor, expected: Number, smallest: Tensor | float) -> float:
    """By what part of the slack the error of `got` exceeds that of torch: of the number where it is the largest."""
    assert got.shape == of_torch.shape == expected.exact.shape and got.dtype == of_torch.dtype
    finite, finite_in_torch = got.isfinite(), of_torch.isfinite()
    # Where a number is NaN or infinite so is torch's, or the truth is infinite: of BCE at a logit of -infinity and a
    # target of 1, of Huber with delta=inf of an infinite difference, and beyond the largest number of the dtype.
    if not finite.all():
        same = places(got) == places(of_torch)
        true = got.isinf() & (places(got) == places(expected.exact.to(got.dtype)))
        assert (finite | same | true).all()
    if not finite.any():
        return 0.0
    slack = SLACK[got.dtype]
    finfo = torch.finfo(got.dtype)
    step = finfo.eps / 2 * expected.size.clamp_min(finfo.tiny)
    error = (got.double() - expected.exact).abs()
    # Where torch's is NaN or infinite, one rounding is the error to compare with.
    error_of_torch = torch.where(finite_in_torch, (of_torch.double() - expected.exact).abs(), step)
    excesses = (error - error_of_torch - smallest) / (slack * step)
    return excesses[finite].max().item()


def run(loss: Loss, function: Callable[..., Tensor], recipe: Recipe, call: Call) -> tuple[Tensor, list[Tensor], Tensor]:
    leaves = [call.input.detach().requires_grad_()]
    target = call.target.detach()
    if recipe.target_grad and loss.target_grad:
        leaves.append(target.requires_grad_())
    value = function(leaves[0], target, call)
    upstream = upstream_of(recipe, value)
    if function is loss.ours:
        assert fusedloss.explain(function, leaves[0], target, call).startswith("fused")
    return value.detach(), torch.autograd.grad(value, leaves, upstream), upstream


def excesses(loss: Loss, recipe: Recipe) -> list[float]:
    call = cooked(loss, recipe)
    value, grads, upstream = run(loss, loss.ours, recipe, call)
    value_of_torch, grads_of_torch, _ = run(loss, loss.torchs, recipe, call)
    of_value, *of_grads = exact(loss, call, upstream)
    # What the arithmetic takes for 0, such as e^-88 in float32, times the largest factors of the above.
    tiny = torch.finfo(torch.float64 if call.input.dtype == torch.float64 else torch.float32).tiny
    smallest = 16 * tiny * (6e4 if loss.inputs == "logits" else 1)
    found = [excess(value, value_of_torch, of_value, smallest * LARGEST)]
    smallest *= max(1.0, upstream.abs().max().item())
    broadcast = call.input.shape != call.target.shape
    for got, of_torch, expected in zip(grads, grads_of_torch, of_grads, strict=False):
        below = torch.tensor(smallest, dtype=torch.float64)  # in float32 it would be 0
        if broadcast:
            below = below * LARGEST
        found.append(excess(got, of_torch, expected, below))
    return found


@pytest.mark.examples
@pytest.mark.parametrize("loss", LOSSES)
def test_no_less_accurate_than_torch(loss):
    @given(one_draw(partial(recipe, LOSSES[loss])))
    def check(recipe):
        assert max(excesses(LOSSES[loss], recipe)) <= 1

    check()


@pytest.mark.parametrize("count", [2000, 4096, 20000])
@pytest.mark.parametrize("loss", LOSSES)
def test_equal_losses_add_up(loss, count):
    # A long chain of additions of one number rounds them all the same way.
    generator = torch.Generator().manual_seed(count)
    for _ in range(5):
        number = torch.rand(2, generator=generator)
        x, t = number.unsqueeze(1).expand(2, count).unbind()
        call = Call(x, t, None, None, "mean", 0.25, 2.0)
        value, of_torch = LOSSES[loss].ours(x, t, call), LOSSES[loss].torchs(x, t, call)
        expected, _, _ = exact(LOSSES[loss], call, torch.ones_like(value))
        assert excess(value, of_torch, expected, 0.0) <= 1


@pytest.mark.parametrize("x", [math.inf, -math.inf])
@pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_an_infinite_logit_is_torchvisions(gamma, t, x):
    # Infinite where torchvision's is, such as a logit of infinity for a negative; NaN only where torchvision's is.
    x, t = torch.tensor([x]), torch.tensor([t])
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = x.sigmoid() * t + (1 - x.sigmoid()) * (1 - t)
    of_torchvision = (0.25 * t + 0.75 * (1 - t)) * ce * (1 - p_t) ** gamma
    value = L.sigmoid_focal_loss(x, t, gamma=gamma)
    assert torch.equal(places(value), places(of_torchvision)) or (value.isposinf() & of_torchvision.isnan()).all()


@pytest.mark.parametrize("beta", [1e-37, 1e-40, 1e-44, 1e-46, 1e-300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smooth_l1_of_a_tiny_beta_is_torchs(dtype, beta):
    # Beyond what 1 / beta is in float32.
    differences = torch.tensor([0.0, 1e-42, -1e-42, 1e-3, -1.0], dtype=torch.float64).to(dtype)
    results = []
    for function in (L.smooth_l1_loss, F.smooth_l1_loss):
        x = differences.clone().requires_grad_()
        value = function(x, torch.zeros_like(x), reduction="none", beta=beta)
        results.append((value.detach(), torch.autograd.grad(value.sum(), x)[0]))
    torch.testing.assert_close(results[0], results[1])


@needs_extension
@pytest.mark.parametrize("beta", [1e-44, 1e-40, 1e-30, 0.7, 1e30, 3e38])
def test_smooth_l1_is_as_exact_for_every_beta(beta):
    """It multiplies by the inverse, which of the smallest and largest numbers is beyond the normal ones."""
    of_kernels = torch.tensor(beta)
    x = (of_kernels * torch.tensor([0, 0.25, -0.5, 0.75, -0.99, 1, -1, 2, -4])).requires_grad_()
    (grad,) = torch.autograd.grad(L.smooth_l1_loss(x, torch.zeros(9), reduction="sum", beta=beta), x)
    exact = (x.detach().double() / of_kernels.double()).clamp(-1, 1)
    assert (grad.double() - exact).abs().max() <= 3 * EPSILON[torch.float32]
