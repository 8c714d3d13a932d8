"""Builds the CUDA kernels for the CPU, and calls them on torch tensors."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import losses
import torch
from compiler import COMPILER, CSRC, WITHOUT_PRELOAD, precompiled
from losses import number
from plant import keep_one_loss, keep_one_of_each_driver, keep_one_type
from torch import Tensor

from fusedloss import _torchs_slopes

LIBRARY = "cuda_on_cpu.so"
SMALL = ("scale.cu", "softmax.cu", "softmax_targets.cu")  # one unit with the driver: their time is that of headers
HERE = Path(__file__).parent / "cuda_on_cpu"
# Of what is undefined, all but what AddressSanitizer sees when memory is read or written. Its checks are calls: they
# compile in two thirds of the time.
SANITIZERS = [
    "-fsanitize=address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover=undefined",
    "--param=asan-instrumentation-with-call-threshold=0",
]
LOSSES, SUM, SUM_AND_GRAD, GRAD, TARGET_GRAD, THIRD_GRAD = range(6)  # PointwiseResult
DIVISOR, FORWARD, BACKWARD = range(3)


# Set in the run under AddressSanitizer.
SANITIZED = bool(os.environ.get("FUSEDLOSS_SANITIZED_KERNELS"))
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# Under sanitizers -O1 compiles for nearly three times as long, which its faster runs do not make up for.
FLAGS += ["-O0", *SANITIZERS] if SANITIZED else ["-O1"]
FLAGS += _torchs_slopes.flags()
DTYPES = [torch.float32, torch.bfloat16] if SANITIZED else losses.DTYPES  # see keep_one_of_each_driver


def build(folder: Path, source: Path = CSRC, only: str = "", flags: Sequence[str] = ()) -> None:
    """Every .cu file as C++ with the executor's header in place of CUDA's, in one library.

    `only` compiles the files it names, in a folder that has the objects of the others.
    """
    compiler = [*COMPILER.split(), *FLAGS, *flags]
    if SANITIZED:
        source = Path(shutil.copytree(source, folder / "csrc", dirs_exist_ok=True))
        keep_one_of_each_driver(source)
    if not only:
        compiler += header(folder)

    def compile(file: Path) -> Path:
        to = folder / f"{file.stem}.o"
        if only in file.name:
            command = [*compiler, "-x", "c++", "-c", f"-I{source}", f"-I{HERE}", str(file), "-o", str(to)]
            done = subprocess.run(command, capture_output=True, text=True, env=WITHOUT_PRELOAD)
            assert done.returncode == 0, done.stderr
        return to

    files = [file for file in sorted((source / "cuda").glob("*.cu")) if file.name not in SMALL]
    unit = folder / "unit.cpp"
    unit.write_text(
        "".join(f'#include "{file}"\n' for file in (*(f"cuda/{name}" for name in SMALL), HERE / "driver.cpp"))
    )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if not (only or SANITIZED):
            pool.submit(header, folder, *UNOPTIMISED)
        objects = list(pool.map(compile, [*files, unit]))
    command = [*compiler, "-shared", *map(str, objects), "-o", str(folder / LIBRARY)]
    subprocess.run(command, check=True, env=WITHOUT_PRELOAD)


def header(folder: Path, *flags: str) -> list[str]:
    """The flags that read the executor's header as the compiler keeps it, for these flags beside its own."""
    name = folder / f"executor{''.join(flags)}.h"
    return precompiled(name, "#include <cuda_on_cpu.h>\n", [*FLAGS, *flags, f"-I{HERE}"])


UNOPTIMISED = ("-O0",)  # as rebuilt() compiles


def loaded(folder: Path) -> ctypes.CDLL:
    kernels = ctypes.CDLL(str(folder / LIBRARY))
    kernels.fault.restype = ctypes.c_char_p
    pretend(kernels)
    return kernels


def rebuilt(kernels: ctypes.CDLL, source: Path, only: str, **one_loss: str) -> ctypes.CDLL:
    """The kernels with the files it names compiled anew from changed sources, in seconds.

    For storage of float alone, of a family named for the one loss given, and without optimisation.
    """
    for family, loss in one_loss.items():
        keep_one_loss(source, family, loss)
    keep_one_type(source, "float")
    folder, built = source.parent, Path(kernels._name).parent
    for compiled in built.glob("*.o"):
        shutil.copy(compiled, folder)
    build(folder, source, only, [*UNOPTIMISED, *header(built, *UNOPTIMISED)])
    return loaded(folder)


def pretend(
    kernels: ctypes.CDLL, seed: int = 0, multiprocessors: int = 2, shared_bytes: int = 227 << 10, clusters: bool = True
) -> None:
    """A device so small that little data reaches every threshold; the seed decides the order of blocks and threads."""
    kernels.pretend(ctypes.c_uint64(seed), multiprocessors, shared_bytes, int(clusters))


@dataclass
class Guarded:
    """A tensor between guard elements, at an offset that decides its alignment: a write beyond it is seen."""

    tensor: Tensor
    storage: Tensor
    before: Tensor

    @classmethod
    def like(cls, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> "Guarded":
        count = int(torch.Size(shape).numel())
        storage = torch.full((count + 64 + offset,), 77.0, dtype=dtype)
        return cls(storage[32 + offset : 32 + offset + count].view(shape), storage, storage.clone())

    def intact(self) -> bool:
        begin = self.tensor.storage_offset()
        end = begin + self.tensor.numel()
        return torch.equal(self.storage[:begin], self.before[:begin]) and torch.equal(
            self.storage[end:], self.before[end:]
        )


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def layout_of(logits: Tensor) -> "ctypes.Array[ctypes.c_int64]":
    """SoftmaxLayout of (N, C) or (N, C, inner): as the torch layer finds it."""
    rows, classes = logits.numel() // logits.shape[1], logits.shape[1]
    if logits.dim() == 2:
        return (ctypes.c_int64 * 6)(rows, classes, rows, 0, logits.stride(1), logits.stride(0))
    inner, batch = logits.shape[2], logits.stride(0)
    one_run = batch == inner * logits.stride(2) or logits.shape[0] == 1
    return (ctypes.c_int64 * 6)(rows, classes, rows if one_run else inner, batch, logits.stride(1), logits.stride(2))


MAX_PARAMS, MAX_DIMS = 8, 6  # kMaxParams and kMaxDims of csrc/kernels/


def parameters(params: tuple[float, ...]) -> "ctypes.Array[ctypes.c_double]":
    return (ctypes.c_double * MAX_PARAMS)(*(params + (0.0,) * MAX_PARAMS)[:MAX_PARAMS])


def check(kernels: ctypes.CDLL, error: int) -> None:
    assert error == 0 and kernels.fault() == b"", f"error {error}: {kernels.fault().decode()}"


class Operand(ctypes.Structure):
    """As in csrc/kernels/pointwise.h."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("dense", ctypes.c_bool),
        ("strides", ctypes.c_int64 * MAX_DIMS),
    ]  # fmt: skip

    @classmethod
    def of(cls, tensor: Tensor, dims: list[int]) -> "Operand":
        """The dimensions from the innermost one on."""
        expected, dense = 1, True
        for dim in dims:
            dense = dense and (tensor.stride(dim) == expected or tensor.shape[dim] == 1)
            expected *= tensor.shape[dim]
        strides = (ctypes.c_int64 * MAX_DIMS)(*(tensor.stride(dim) for dim in dims))
        return cls(tensor.data_ptr(), losses.DTYPES.index(tensor.dtype), dense, strides)


class PointwiseCall(ctypes.Structure):
    """As in driver.cpp."""

    _fields_ = (
        [
            (name, ctypes.c_int64)
            for name in (
                "loss", "result", "arithmetic", "one_upstream", "output_dtype", "total_dtype", "count", "dims",
            )
        ]
        + [("sizes", ctypes.c_int64 * MAX_DIMS)]
        + [(name, Operand) for name in ("input", "target", "weight", "third", "upstream")]
        + [("params", ctypes.c_double * MAX_PARAMS)]
        + [("scale", ctypes.c_double), ("divisor", ctypes.c_double)]
        + [("output", ctypes.c_void_p), ("total", ctypes.c_void_p)]
        + [("bad_target", ctypes.c_int64 * 2)]
    )  # fmt: skip


CUSTOM = "custom"  # the loss of driver.cpp


def run_pointwise(
    kernels: ctypes.CDLL, name: str, params: tuple[float, ...], result: int, input: Tensor, target: Tensor,
    weight: Tensor | None = None, output: Tensor | None = None, upstream: Tensor | None = None, scale: float = 1.0,
    total: Tensor | None = None, divisor: float = 1.0, third: Tensor | None = None, refused: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Operands that broadcast to the input and a target of its shape; an upstream gradient without dimensions is one
    for all. Elements are numbered in the order of the output."""
    shape = torch.broadcast_shapes(input.shape, target.shape)
    one_upstream = upstream is not None and upstream.dim() == 0
    given = {"input": input, "target": target, "weight": weight, "third": third}
    if not one_upstream:
        given["upstream"] = upstream
    operands = {field: tensor.expand(shape) for field, tensor in given.items() if tensor is not None}
    order = torch.empty(shape, device="meta") if output is None else output
    dims = sorted(range(len(shape)), key=lambda dim: (order.stride(dim), -dim))
    count = torch.Size(shape).numel()
    double = any(tensor.dtype == torch.float64 for tensor in operands.values())
    call = PointwiseCall(
        loss=-1 if name == CUSTOM else number(name), result=result,
        arithmetic=losses.DTYPES.index(torch.float64 if double else torch.float32), one_upstream=one_upstream,
        count=count, dims=len(dims), scale=scale, divisor=divisor, params=parameters(params),
        **{field: Operand.of(tensor, dims) for field, tensor in operands.items()},
    )  # fmt: skip
    call.sizes[: len(dims)] = [shape[dim] for dim in dims]
    if one_upstream:
        call.upstream = Operand(upstream.data_ptr(), losses.DTYPES.index(upstream.dtype))
    for field, tensor in (("output", output), ("total", total)):
        if tensor is not None:
            setattr(call, field, tensor.data_ptr())
            setattr(call, f"{field}_dtype", losses.DTYPES.index(tensor.dtype))
    error = kernels.run_pointwise(ctypes.byref(call))
    if refused:
        assert error == 1, f"expected cudaErrorInvalidValue, got {error}"
    else:
        check(kernels, error)
    return call.bad_target[0], call.bad_target[1]


def run_indexed(
    kernels: ctypes.CDLL, name: str, params: tuple[float, ...], result: int, input: Tensor, index: Tensor,
    weight: Tensor | None = None, output: Tensor | None = None, upstream: Tensor | None = None,
    total: Tensor | None = None, mean: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """Logits (outer, classes, inner), index (outer, inner), and a weight that broadcasts to the logits."""
    strides = (0, 0, 0) if weight is None else weight.expand(input.shape).stride()
    bad_target = (ctypes.c_int64 * 2)()
    error = kernels.run_indexed(
        number(name), result, losses.DTYPES.index(input.dtype), parameters(params),
        (ctypes.c_int64 * 3)(*input.shape), pointer(input), pointer(index), ctypes.c_int64(-100), pointer(weight),
        (ctypes.c_int64 * 3)(*strides), pointer(output), pointer(upstream),
        ctypes.c_int64(0 if upstream is None or upstream.dim() == 0 else 1), pointer(total), int(mean), bad_target,
    )  # fmt: skip
    check(kernels, error)
    return bad_target[0], bad_target[1]


class SoftmaxCall(ctypes.Structure):
    """As in driver.cpp."""

    _fields_ = (
        [
            (name, ctypes.c_int64)
            for name in (
                "what", "loss", "dtype", "wide", "byte_target", "wide_probabilities", "ignore_index", "mean",
                "zero_for_none", "in_place", "upstream_stride", "upstream_second_stride",
            )
        ]
        + [("params", ctypes.c_double * MAX_PARAMS)]
        + [(f"{name}_layout", ctypes.c_int64 * 6) for name in ("logits", "probabilities", "grad")]
        + [
            (name, ctypes.c_void_p)
            for name in (
                "logits", "target", "probabilities", "weight", "sample_weight", "upstream", "upstream_second",
                "losses", "second", "total", "statistics", "divisor", "grad",
            )
        ]
        + [("bad_target", ctypes.c_int64 * 2)]
    )  # fmt: skip


def run_softmax(
    kernels: ctypes.CDLL, what: int, name: str, params: tuple[float, ...], logits: Tensor, target: Tensor,
    mean: bool = False, zero_for_none: bool = False, in_place: bool = False, wide: bool = False,
    ignore_index: int = -100, **tensors: Tensor | None,
) -> tuple[int, int]:  # fmt: skip
    """`tensors`: weight, sample_weight, losses, second, total, statistics, divisor, grad, upstream, upstream_second."""
    soft = target.is_floating_point()
    call = SoftmaxCall(
        what=what, loss=number(name), dtype=losses.DTYPES.index(logits.dtype), wide=wide,
        byte_target=target.dtype == torch.uint8, wide_probabilities=soft and target.dtype != logits.dtype,
        ignore_index=ignore_index, mean=mean, zero_for_none=zero_for_none, in_place=in_place,
        params=parameters(params), logits_layout=layout_of(logits),
    )  # fmt: skip
    grad = tensors.get("grad")
    call.probabilities_layout = layout_of(target if soft else logits)
    call.grad_layout = layout_of(logits if grad is None else grad)
    for field, tensor in {"logits": logits, ("probabilities" if soft else "target"): target, **tensors}.items():
        setattr(call, field, None if tensor is None else tensor.data_ptr())
    for field in ("upstream", "upstream_second"):
        upstream = tensors.get(field)
        setattr(call, f"{field}_stride", 0 if upstream is None or upstream.dim() == 0 else 1)
    check(kernels, kernels.run_softmax(ctypes.byref(call)))
    return call.bad_target[0], call.bad_target[1]


LABELS = [
    torch.int64, torch.int32, torch.int16, torch.int8, torch.float32, torch.float64, torch.bfloat16, torch.float16
]  # fmt: skip


class RowSumsCall(ctypes.Structure):
    """As in driver.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "backward", "loss", "dtype", "result_dtype", "label_type", "rows", "columns", "upstream_stride",
            )
        ),
        ("row_strides", ctypes.c_int64 * 3),
        ("params", ctypes.c_double * MAX_PARAMS),
        *((name, ctypes.c_double) for name in ("scale", "divisor")),
        ("operands", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("target", "weight", "upstream", "losses", "total")),
        ("grads", ctypes.c_void_p * 3),
        ("bad_target", ctypes.c_int64 * 2),
    ]  # fmt: skip


def run_row_sums(
    kernels: ctypes.CDLL, name: str, params: Sequence[float], operands: Sequence[Tensor], target: Tensor | None = None,
    weight: Tensor | None = None, losses_: Tensor | None = None, total: Tensor | None = None, divisor: float = 1.0,
    grads: Sequence[Tensor | None] = (), upstream: Tensor | None = None, scale: float = 1.0,
) -> tuple[int, int]:  # fmt: skip
    """A forward, or where gradients are given a backward, of operands (rows, columns)."""
    first = operands[0]
    result = next(each for each in (losses_, total, upstream) if each is not None)
    call = RowSumsCall(
        backward=bool(grads), loss=number(name), dtype=losses.DTYPES.index(first.dtype),
        result_dtype=losses.DTYPES.index(result.dtype), label_type=0 if target is None else LABELS.index(target.dtype),
        rows=first.shape[0], columns=first.shape[1], upstream_stride=0 if upstream is None or not upstream.dim() else 1,
        params=parameters(tuple(params)), scale=scale, divisor=divisor,
    )  # fmt: skip
    for k, operand in enumerate(operands):
        call.operands[k], call.row_strides[k] = operand.data_ptr(), operand.stride(0)
    for k, grad in enumerate(grads):
        call.grads[k] = None if grad is None else grad.data_ptr()
    for field, tensor in {
        "target": target, "weight": weight, "upstream": upstream, "losses": losses_, "total": total
    }.items():  # fmt: skip
        setattr(call, field, None if tensor is None else tensor.data_ptr())
    check(kernels, kernels.run_row_sums(ctypes.byref(call)))
    return call.bad_target[0], call.bad_target[1]


def run_scale(kernels: ctypes.CDLL, data: Tensor, factor: Tensor) -> None:
    dtype = losses.DTYPES.index(data.dtype)
    wide = int(factor.dtype != data.dtype)
    check(kernels, kernels.run_scale(dtype, pointer(data), ctypes.c_int64(data.numel()), pointer(factor), wide))


# ---- what the tests of all kernels share

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
WIDTH = {torch.float64: 2, torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}  # elements of a vector of 16 bytes
IN_FORWARD = [dtype for dtype in DTYPES if dtype != torch.float16]  # which never makes its gradient in forward


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert torch.equal(got.isnan(), expected.isnan()), f"{what}: NaN at other places"
    expected = expected.nan_to_num()
    scale = expected.abs().max() if expected.numel() else torch.tensor(0.0)
    error = (got.double().nan_to_num() - expected).abs().max() if expected.numel() else torch.tensor(0.0)
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormals, where fp16 gradients may lie
    assert error <= TOLERANCES[dtype] * scale + step, f"{what}: off by {error / scale:.1e} of the largest"


def filled(values: Tensor, dtype: torch.dtype, offset: int = 0) -> Guarded:
    guarded = Guarded.like(tuple(values.shape), dtype, offset)
    guarded.tensor.copy_(values)
    guarded.before.copy_(guarded.storage)
    return guarded
