"""A test of the tests: with one thing wrong in a formula or a driver, the comparison with native must fail.

Each mutant is the kernels' source with one edit, compiled with the one loss that it makes wrong and driven without
torch. The same build without the edit must agree.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import index_calls
import pytest
import torch
import torch.nn.functional as F
from compiler import COMPILER, CSRC, fingerprint, precompiled
from emulated import Kernels, pointer
from losses import (
    CROSS_ENTROPY,
    FOCAL_WITHOUT_FOCUS,
    LOSSES,
    NATIVE,
    SIGMOID_FOCAL_WITHOUT_FOCUS,
    SOFTMAX,
    Loss,
    loss_named,
    traits,
)
from marks import needs_compiler, needs_extension
from plant import keep_one_loss, keep_one_type, planted
from torch import Tensor

from fusedloss import _torchs_slopes

pytestmark = needs_extension


ONE_HOT, TILES = "cpu/one_hot.inl", "cpu/pointwise_tiles.inl"
# The loss that comes out wrong: {name: (file, what stands there, what is put in its place)}
MUTANTS = {
    "mse": {
        "mse slope": ("losses/pointwise.h", "T(2) * (x - t)", "x - t"),
        "tail of a sum": (
            "cpu/pointwise.inl",
            "for (int lane = 0; i + lane < stop; ++lane) lanes[lane] += at(i + lane);",
            "",
        ),
    },
    "l1": {
        "l1 slope": ("losses/pointwise.h", "T(x > t) - T(x < t)", "T(x > t)"),
    },
    "smooth_l1": {
        "smooth l1 value": ("losses/pointwise.h", "abs(z) - T(0.5) * beta", "abs(z)"),
        "smooth l1 slope": ("losses/pointwise.h", "select(z <= -beta, T(-1), in_betas(z))", "in_betas(z)"),
    },
    "binary_cross_entropy": {
        "bce value": ("losses/pointwise.h", "(t - T(1)) * of_zero - t * of_one", "-t * of_one"),
        "bce slope": ("losses/pointwise.h", "(T(1) - x) * x;", "x;"),
        "bce target": ("losses/pointwise.h", "return Logarithms::of_rest(x) - Logarithms::of(x);", "return -log(x);"),
    },
    "binary_cross_entropy_with_logits": {
        "logits value": (
            "losses/pointwise.h",
            "T value(T x, T t) const { return select(x < T(0), -t * x, (T(1) - t) * x)",
            "T value(T x, T t) const { return (-t * x)",
        ),
        "logits slope": ("losses/pointwise.h", "(T(1) - t) * s.p - t * s.q;", "s.p - t;"),
        "pos_weight value": ("losses/pointwise.h", "(wanted + other) * sigmoid(x)", "sigmoid(x)"),
        "pos_weight slope": ("losses/pointwise.h", "- weight * t * s.q", "- t * s.q"),
        "pos_weight target": ("losses/pointwise.h", "weight * (select(x < T(0), -x, T(0)) + softplus)", "softplus"),
        "tiles at the same place": (
            "cpu/pointwise_tiles.inl",
            "tile.read(first, last)",
            "tile.read(begin, begin + last - first)",
        ),
        "a row on": ("cpu/pointwise_tiles.inl", "offset += strides[d];", ""),
    },
    "huber": {
        "huber value": ("losses/pointwise.h", "select(z <= delta, T(0.5)", "select(z <= delta, T(0.25)"),
        "huber slope below": ("losses/pointwise.h", "z < -delta ? -delta : z", "z < -delta ? delta : z"),
    },
    "sigmoid_focal": {
        "sigmoid focal gamma": ("losses/pointwise.h", "modulation.gamma * (T(1)", "T(2) * (T(1)"),
        "sigmoid focal alpha": ("losses/pointwise.h", "T(2 * alpha - 1)", "T(1 - 2 * alpha)"),
        "sigmoid focal certain": ("losses/pointwise.h", "s.p * (T(1) - t) - s.q * t", "s.p - t"),
        "rows of the first tile alone": (
            ONE_HOT,
            "int64_t outer = begin / slab",
            "int64_t outer = begin / slab + (begin > 0)",
        ),
        "the background takes a column": (ONE_HOT, "index >= 0 && index < classes", "index >= 0"),
        "ignored rows summed": (TILES, "if (tile.any_ignored() && (sums || checks))", "if (false)"),
        "ignored rows with a gradient": (TILES, "if (tile.any_ignored()) tile", "if (false) tile"),
        "an ignored row cut by a tile": (
            ONE_HOT,
            "(begin - first + inner - 1) / inner : 0",
            "(begin - first) / inner + 1 : 0",
        ),
        "the class of a run": (ONE_HOT, "(index[k] == class_ ? T(1) : T(0))", "(index[k] == run ? T(1) : T(0))"),
        "a run's weight": (TILES, "offset += strides[d];", "offset += d == 1 ? 0 : strides[d];"),
        "a class's weight": (TILES, "f(offset, strides[run], count)", "f(offset, 0, count)"),
    },
    "hinge_embedding": {
        "hinge value": ("losses/margin.h", "select(missing < T(0), T(0), missing)", "missing"),
        "hinge slope": ("losses/margin.h", "select(t == T(1), T(0), of_minus_one);\n  }\n};", "of_minus_one;\n  }\n};"),
    },
    "soft_margin": {
        "soft margin value": ("losses/margin.h", "select(z < T(0), -z, T(0))", "-z"),
        "soft margin slope": ("losses/margin.h", "-t * sigmoid(x * t).q", "-sigmoid(x * t).q"),
    },
    "kl_div": {
        "divergence value": ("losses/divergence.h", "functions::log(t)) - x);", "functions::log(t)) + x);"),
        "divergence target": ("losses/divergence.h", "functions::log(t) + T(1) - x", "functions::log(t) - x"),
    },
    "kl_div_log_target": {
        "log target slope": ("losses/divergence.h", "return -functions::exp(t);", "return -t;"),
        "log target": ("losses/divergence.h", "((t - x) + T(1))", "(t - x)"),
    },
    "poisson_nll": {
        "counts slope": ("losses/divergence.h", "functions::exp(x) - t; }", "functions::exp(x); }"),
        "stirling": ("losses/divergence.h", "half_log_two_pi));", "T(1)));"),
        "stirling slope": ("losses/divergence.h", "T(0.5) / t);", "T(0));"),
        "no constant": ("losses/divergence.h", "params[0] == 0", "params[0] != 0"),
    },
    "poisson_nll_rate": {
        "rates slope": ("losses/divergence.h", "T(1) - t / (x + eps)", "T(1) - t / x"),
        "rates target": (
            "losses/divergence.h",
            "Constant::slope(t) - functions::log(x + eps)",
            "-functions::log(x + eps)",
        ),
        "rates without the constant": (
            "losses/divergence.h",
            "return params[1] == 0; }",
            "return params[0] != 0; }",
        ),
    },
    "margin_ranking": {
        "ranking value": ("losses/margin.h", "select(m < T(0), T(0), m)", "m"),
        "ranking slope": ("losses/margin.h", "select(on_slope(missing(x, t, y)), -y, T(0))", "-y"),
        "ranking label": ("losses/margin.h", "select(on_slope(missing(x, t, y)), -(x - t), T(0))", "-(x - t)"),
    },
    "gaussian_nll": {
        "gaussian value": ("losses/divergence.h", "z * z / variance) + constant", "z * z) + constant"),
        "gaussian constant": ("losses/divergence.h", "z * z / variance) + constant", "z * z / variance)"),
        "gaussian slope": ("losses/divergence.h", "(x - t) / bounded(v)", "x - t"),
        "gaussian bound": ("losses/divergence.h", "select(v < eps, eps, v)", "v"),
        "variance slope": ("losses/divergence.h", "T(0.5) / variance - T(0.5)", "T(1) / variance - T(0.5)"),
    },
    "cross_entropy": {
        "softmax q by subtraction": ("losses/row.h", "sum_without_target * inverse,", "T(1) - own * inverse,"),
        "softmax log without 1p": ("losses/row.h", "log1p(select(", "log(T(1) + select("),
        "smoothing kept whole": ("losses/softmax.h", "b = upstream * kept * weight", "b = upstream * weight"),
        "sum without the target": ("losses/row.h", "Sum::add(sum, Column<T>{own, logit - max, factor});", ""),
        "mass without the target": ("losses/row.h", "statistics.mass + factor};", "statistics.mass};"),
        "gradient without the factor": ("losses/row.h", "return value - s * column.factor;", "return value;"),
        "z-loss slope": ("losses/softmax.h", "{smooth + T(2) * upstream * z_loss", "{smooth + upstream * z_loss"),
        "softcap slope": ("losses/logit.h", "T(4) * e.value * one_over * one_over", "T(1)"),
        "target left in a row": ("cpu/softmax_groups.inl", " | int(column == Int(skipped))", ""),
        "target left in a column": ("cpu/softmax_columns.inl", "z[place * kTile + j] = -infinity<T>();", ""),
        "filling counted": ("cpu/softmax_groups.inl", "int(column < Int(first)) | ", ""),
        "square askew": ("cpu/lanes.inl", "FUSEDLOSS_SHUFFLE(low, next_low, 2, 3, 6, 7)", "low"),
        "block rescale": (
            "cpu/softmax_rows.inl",
            "if (block > begin) total = raised<typename Loss::Sum>(total, max);",
            "",
        ),
        "column rescale": (
            "cpu/softmax_columns.inl",
            "totals.sum_without_target[j] * double(shrunk) + double(tile.sum_without_target[j])",
            "totals.sum_without_target[j] + double(tile.sum_without_target[j])",
        ),
        "column sum not moved": ("cpu/softmax_columns.inl", "double(tile.sum[j]) - moved", "double(tile.sum[j])"),
        "kept block not rescaled": (
            "cpu/softmax_with_grad.inl",
            "coefficients.exponential *= exp(kept.max_of_block[block / kBlock] - tile.max[j]);",
            ";",
        ),
        "kept column not rescaled": (
            "cpu/softmax_with_grad.inl",
            "gradients.exponential_coefficient[j] *= exp(max[j] - tile.max[j]);",
            ";",
        ),
        "a row's weight not in its loss": ("cpu/softmax_tile.inl", "tile.counts[i] * value", "value"),
        "a row's weight not in its gradient": ("cpu/softmax_tile.inl", " * double(tile.counts[j])", ""),
        "a row of weight 0 not ignored": ("cpu/softmax_tile.inl", "      ++ignored;\n", ""),
        "kept tail lost": ("cpu/softmax_groups.inl", "kept[count - filled + i] = last[kLanes - filled + i];", ";"),
    },
    "focal": {
        "focal ratio": ("losses/softmax.h", "T(1) + gamma * ratio", "T(1) + gamma"),
    },
    "soft_cross_entropy": {
        "probabilities unsmoothed": ("losses/softmax.h", "probability * kept + uniform", "probability"),
    },
    "nll": {
        "a row's weight not in its gradient": ("cpu/softmax_targets.inl", " * double(counts)", ""),
        "a row's weight not in its loss": ("cpu/softmax_targets.inl", "counts * loss.value(", "loss.value("),
        "nll sign": ("losses/softmax.h", "return -weight * upstream;", "return weight * upstream;"),
    },
    "log_probs": {
        "temperature slope": ("losses/logit.h", "return {x * scale, scale};", "return {x * scale, T(1)};"),
    },
}


FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"]
FLAGS += _torchs_slopes.flags()
STANDARD = ("cfloat", "cmath", "cstdint", "cstring", "type_traits", "vector")


@pytest.fixture(scope="session")
def standard_headers(once) -> list[str]:
    """A third of what a mutant takes to compile."""
    includes = "".join(f"#include <{name}>\n" for name in STANDARD)
    folder = once(
        f"standard-{fingerprint(includes + ' '.join(FLAGS))}",
        lambda to: precompiled(to / "standard.h", includes, FLAGS),
    )
    return precompiled(folder / "standard.h", includes, FLAGS)


def build(folder: Path, headers: list[str], loss: str, edit: tuple[str, str, str] | None) -> ctypes.CDLL:
    source = planted(folder, *edit) if edit else Path(shutil.copytree(CSRC, folder / "csrc"))
    # One storage type and one loss.
    keep_one_type(source, "double")
    family = "softmax" if any(each.op == loss for each in SOFTMAX) else "pointwise"
    keep_one_loss(source, family, loss)
    library = folder / "kernels.so"
    driver = Path(__file__).with_name(f"{family}_driver.cpp")
    command = [*COMPILER.split(), *FLAGS, *headers, "-shared", f"-I{source}", str(driver), "-o", str(library)]
    subprocess.run(command, check=True)
    kernels = ctypes.CDLL(str(library))
    for function in ("run_softmax",) if family == "softmax" else ("run_pointwise", "run_indexed"):
        getattr(kernels, function).restype = ctypes.c_double
    return kernels


def run(
    kernels: Kernels, loss: Loss, x: Tensor, target: Tensor, third: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> tuple[float, Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the losses, the losses, the gradient of their sum and that by the target or the third operand, if the loss
    has one."""
    params = (ctypes.c_double * 8)(*(loss.params + (0.0,) * 8)[:8])
    grad_target = x.new_empty(0)
    losses, grad = torch.empty(loss.losses_shape(x.shape), dtype=x.dtype), torch.empty_like(x)
    head = (0, int(x.dtype == torch.float64))
    if loss in SOFTMAX:
        statistics = torch.empty(3 * len(x), dtype=x.dtype)
        index, probabilities = (None, pointer(target)) if loss.soft else (pointer(target), None)
        total = kernels.run_softmax(
            *head, ctypes.c_int64(len(x)), ctypes.c_int64(x.shape[1]), pointer(x), index, probabilities,
            params, pointer(statistics), pointer(losses), pointer(grad), pointer(sample_weight),
        )  # fmt: skip
    else:
        slopes = [traits(loss.op).has_target_slope, traits(loss.op).has_third_slope and third is not None]
        grad_target = torch.empty_like(x) if any(slopes) else x.new_empty(0)
        total = kernels.run_pointwise(
            *head, ctypes.c_int64(x.numel()), pointer(x), pointer(target),
            pointer(third), ctypes.c_int64(x.shape[-1]),
            (ctypes.c_int64 * 2)(*(0, 0) if third is None else third.expand_as(x).stride()[::-1]), params,
            pointer(losses), pointer(grad), *(pointer(grad_target) if slope else None for slope in slopes),
        )  # fmt: skip
    return total, losses, grad, grad_target


def agrees_with_native(kernels: Kernels, op: str) -> bool:
    """With all parameters that the tests have for the loss."""
    for loss in [loss for loss in LOSSES if loss.op == op]:
        confident = loss is CROSS_ENTROPY or loss.op == "focal"  # see accuracy/test_values.py: digits
        native = FOCAL_WITHOUT_FOCUS.native if loss is CROSS_ENTROPY else loss.native
        if loss.op == "binary_cross_entropy_with_logits":
            native = SIGMOID_FOCAL_WITHOUT_FOCUS.native  # whose formula keeps the digits that torch's loses
        for shape in [(40, 7), (40, 50), (5, 200), (2, 9000)] if loss in SOFTMAX else [(5000,), (7, 11)]:
            x, target = loss.data(shape, torch.float64, seed=1)
            if confident:
                x[0, target[0]] += 60
            if loss not in SOFTMAX and not loss.of_probabilities and op != "asymmetric":
                x[:20] *= 12  # confident elements, whose digits asymmetric's native formula loses
            if not agrees(loss, native, x, target, run(kernels, loss, x, target), confident):
                return False
    if op == "binary_cross_entropy_with_logits":
        return agrees_with_pos_weight(kernels)
    if op in ("cross_entropy", "nll"):
        return agrees_with_sample_weight(kernels, loss_named(op))
    if op not in {loss.op for loss in SOFTMAX} and traits(op).has_third_slope:
        return agrees_with_third(kernels, op)
    return op != "sigmoid_focal" or agrees_with_class_indices(kernels)


def agrees(loss, native, x: Tensor, target: Tensor, results, confident: bool = False) -> bool:
    exact_x, exact_target = x.clone().requires_grad_(), target.clone()
    total, losses, grad, grad_target = results
    if grad_target.numel():
        exact_target.requires_grad_()
    exact = native(exact_x, exact_target, "none")
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x, retain_graph=True)
    # Every single digit, but where the gradient is itself a difference.
    cancelled = 1e-300 if confident or loss not in SOFTMAX else 1e-13 * exact_grad.abs().max().item()
    close = [
        torch.allclose(torch.tensor(total, dtype=torch.float64), exact.detach().sum(), rtol=1e-12, atol=0),
        torch.allclose(losses, exact.detach(), rtol=1e-12, atol=1e-14 if loss.of_probabilities else 1e-300),
        torch.allclose(grad, exact_grad, rtol=1e-10, atol=cancelled),
    ]
    if grad_target.numel():
        (exact_slope,) = torch.autograd.grad(exact.sum(), exact_target)
        close.append(torch.allclose(grad_target, exact_slope, rtol=1e-10, atol=1e-13))
    return all(close)


def agrees_with_pos_weight(kernels: Kernels) -> bool:
    """Of columns and of rows, read through their strides, over several tiles of 1024 numbers."""
    loss = loss_named("binary_cross_entropy_with_logits")
    x, target = loss.data((500, 7), torch.float64)
    for shape in [(7,), (500, 1)]:
        weight = torch.rand(shape, dtype=torch.float64) + 0.5
        native = lambda x, t, r: F.binary_cross_entropy_with_logits(x, t, reduction=r, pos_weight=weight)  # noqa: B023, E731
        if not agrees(loss, native, x, target, run(kernels, loss, x, target, weight)):
            return False
    return True


def agrees_with_third(kernels: Kernels, op: str) -> bool:
    """Operands of elements, columns and rows. The gradient by the third one is held against that by a target."""
    loss = loss_named(next(loss.name for loss in LOSSES if loss.op == op))
    x, target = loss.data((500, 7), torch.float64)
    for shape in [(500, 7), (7,), (500, 1)]:
        third = torch.randn(shape, dtype=torch.float64)
        third = third.sign() if op == "margin_ranking" else third.abs()
        third = third.expand_as(x).clone() if shape == (500, 7) else third
        whole = third.expand_as(x).clone()
        native = lambda x, v, r: NATIVE[op](x, target, None, r, *loss.params, third=v)  # noqa: E731
        if not agrees(loss, native, x, whole, run(kernels, loss, x, target, third)):
            return False
    return True


def agrees_with_sample_weight(kernels: Kernels, loss: Loss) -> bool:
    """Rows and columns, of which some weigh nothing and hold no numbers."""
    for shape in [(40, 7), (5, 200)]:
        x, target = loss.data(shape, torch.float64)
        s = torch.rand(shape[0], dtype=torch.float64) + 0.5
        s[::4] = 0
        x[::4] = float("nan")
        native = lambda x, t, r: NATIVE[loss.op](x, t, None, r, -100, *loss.params, sample_weight=s)  # noqa: B023, E731
        if not agrees(loss, native, x, target, run(kernels, loss, x, target, sample_weight=s)):
            return False
    return True


def agrees_with_class_indices(kernels: Kernels) -> bool:
    params = index_calls.PARAMS[0]
    for shape in [(300, 80, 1), (3, 5000, 1), (40, 9, 5), (2, 9, 700)]:
        x, y = index_calls.data(shape, seed=1)
        for weight in (None, *index_calls.weights_of(shape, torch.float64).values()):
            strides = (0, 0, 0) if weight is None else weight.expand(shape).stride()
            leaf = x.clone().requires_grad_()
            exact = index_calls.FORMULA(leaf, y, weight, "none", -100, *params)
            (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
            losses, in_forward, grad = (torch.full_like(x, 77.0) for _ in range(3))
            total = kernels.run_indexed(
                0, 1, (ctypes.c_int64 * 3)(*shape), pointer(x), pointer(y), pointer(weight),
                (ctypes.c_int64 * 3)(*strides), (ctypes.c_double * 2)(*params), pointer(losses),
                pointer(in_forward), pointer(grad),
            )  # fmt: skip
            close = [
                torch.allclose(torch.tensor(total, dtype=torch.float64), exact.detach().sum(), rtol=1e-12, atol=0),
                torch.allclose(losses, exact.detach(), rtol=1e-12, atol=1e-300),
                torch.allclose(in_forward, exact_grad, rtol=1e-10, atol=1e-300),
                torch.allclose(grad, exact_grad, rtol=1e-10, atol=1e-300),
            ]
            if not all(close):
                return False
    return True


@needs_compiler
@pytest.mark.deep("mutants of the formulas and drivers, which must fail; the kernels as they are were compared")
@pytest.mark.parametrize("loss", MUTANTS)
def test_the_kernels_as_they_are_agree(loss, tmp_path, standard_headers):
    assert agrees_with_native(build(tmp_path, standard_headers, loss, None), loss)


@needs_compiler
@pytest.mark.deep("mutants of the formulas and drivers, which must fail; the kernels as they are were compared")
@pytest.mark.parametrize(("loss", "mutant"), [(loss, mutant) for loss, some in MUTANTS.items() for mutant in some])
def test_a_mutant_is_caught(loss, mutant, tmp_path, standard_headers):
    assert not agrees_with_native(build(tmp_path, standard_headers, loss, MUTANTS[loss][mutant]), loss)
