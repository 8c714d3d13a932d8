"""Divergences over a sharded vocabulary in processes of their own, which meet over gloo.

python divergence_ranks.py RANKS FOLDER CHECK...    runs checks; what fails is printed, and ends the process
"""

import contextlib
import sys
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import distillation_calls as formulas
import torch
import torch.distributed as dist
from distillation_calls import DIRECTIONS, REDUCTIONS, TEACHERS
from observe import peak_bytes
from processes import LIMITS, Collectives, cuts, expect, main, raises, same_bits, sharding, within
from torch import Tensor

import fusedloss
import fusedloss.functional as whole
from fusedloss import parallel
from fusedloss.parallel import _pair_rows

CLASSES = 13


class Data(NamedTuple):
    """Of all classes."""

    student: Tensor
    teacher: Tensor
    labels: Tensor  # some of them to ignore
    weight: Tensor  # of rows, some of them 0


def data(
    rows: tuple[int, ...] = (21,),
    dtype: torch.dtype = torch.float32,
    teacher_is: str = "logits",
    classes: int = CLASSES,
) -> Data:
    student, teacher = formulas.pair((*rows, classes), dtype, teacher_is)
    labels = torch.zeros(rows, dtype=torch.int64)
    weight = torch.rand(rows, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.25
    if labels.numel() > 3:
        labels.view(-1)[1::4] = -100
        weight.view(-1)[2::7] = 0
    return Data(student, teacher, labels, weight.to(dtype))


def mine(x: Tensor, ends: list[int]) -> Tensor:
    rank = dist.get_rank()
    return x[..., ends[rank] : ends[rank + 1]]


def upstream_of(loss: Tensor) -> Tensor:
    drawn = torch.rand(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return drawn.bfloat16().to(loss.dtype)  # exact in every dtype


def of_rows(d: Data, how: str) -> dict[str, Tensor]:
    return {name: getattr(d, name) for name in ("labels", "weight") if name in how}


def exact(d: Data, how: str, reduction: str, **options: Any) -> tuple[Tensor, Tensor]:
    """In one process and float64, by a formula of its own."""
    x = d.student.detach().double().requires_grad_()
    losses = formulas.rows(x, d.teacher, **options)
    kept = d.labels != -100 if "labels" in how else None
    loss = formulas.reduced(losses, x.shape[-1], reduction, kept, d.weight if "weight" in how else None)
    (grad,) = torch.autograd.grad(loss, x, upstream_of(loss))
    return loss.detach(), grad


def sharded(d: Data, ends: list[int], how: str, cut: str = "", **options: Any) -> tuple[Tensor, Tensor]:
    x = mine(d.student, ends).detach().clone().requires_grad_()
    with Collectives() as collectives:
        loss = parallel.kl_divergence(x, mine(d.teacher, ends), **of_rows(d, how), **options, **sharding(ends, cut))
    rounds = 2 if options.get("direction") == "jsd" else 1
    expect([name for name, _ in collectives.sent] == ["_c10d_functional.all_gather_into_tensor.default"] * rounds,
           f"{options}: {collectives.sent}")  # fmt: skip
    with Collectives() as collectives:
        (grad,) = torch.autograd.grad(loss, x, upstream_of(loss))
    expect(not collectives.sent, f"{options}, backward: expected no communication, got {collectives.sent}")
    return loss.detach(), grad


def compare(
    name: str, d: Data, ends: list[int], how: str = "", cut: str = "", slack: float = 1, **options: Any
) -> None:
    loss, grad = sharded(d, ends, how, cut, **options)
    same_bits(name, [loss])
    value, of_all = exact(d, how, **{"reduction": "batchmean", "direction": "forward", **options})
    expect(loss.dtype == d.student.dtype and grad.dtype == d.student.dtype, f"{name}: {loss.dtype}, {grad.dtype}")
    limit = slack * max(LIMITS[d.student.dtype], 4e-6 if d.student.dtype == torch.float32 else 0)
    # A divergence is a difference of logarithms, each with its roundings.
    within(f"{name}, value", loss, value, value.abs() + 1, limit)
    within(f"{name}, gradient", grad, mine(of_all, ends), of_all, limit)


# ---- checks


def values(dtypes: tuple[torch.dtype, ...] = tuple(LIMITS)) -> None:
    hows = ("", "labels", "weight", "labels, weight")
    for number, (direction, teacher_is, reduction, dtype) in enumerate(
        product(DIRECTIONS, TEACHERS, REDUCTIONS, dtypes)
    ):
        d = data((21,), dtype, teacher_is)
        if teacher_is == "probs":
            d = d._replace(teacher=d.teacher.clamp_min(2.0**-20))
        cut = ("even", "uneven", "empty")[number % 3]
        options = {"direction": direction, "teacher_is": teacher_is, "reduction": reduction, "beta": 0.3}
        compare(
            f"{options}, {dtype}, {cut}", d, cuts(CLASSES)[cut], hows[number // 3 % 4], cut, temperature=1.7, **options
        )


def few_values() -> None:
    for direction in DIRECTIONS:
        compare(f"{direction}, hidden", data(dtype=torch.float64), cuts(CLASSES)["uneven"], "labels, weight",
                direction=direction, temperature=1.7)  # fmt: skip
        compare(f"{direction}, given", data((2, 3, 4), torch.bfloat16, "log_probs"), cuts(CLASSES)["empty"],
                direction=direction, teacher_is="log_probs", reduction="none")  # fmt: skip


def shapes() -> None:
    for direction in DIRECTIONS:
        for rows in ((), (1,), (0,), (2, 3), (2, 1, 4)):
            d = data(rows, torch.float64)
            if 0 in rows:
                x = mine(d.student, cuts(CLASSES)["even"])
                loss = parallel.kl_divergence(x, x, direction=direction, vocab_size=CLASSES)
                expect(bool(loss.isnan()), f"no rows: expected NaN, got {loss}")
                continue
            compare(f"{direction}, {rows}", d, cuts(CLASSES)["uneven"], direction=direction, reduction="none")
        for dtype in (torch.float32, torch.bfloat16):
            compare(f"{direction}, long rows", data((5,), dtype, classes=9001), cuts(9001)["even"], direction=direction)


def masks() -> None:
    """Ranks without mass on either side or on both, and rows far from 0."""
    ends = cuts(CLASSES)["even"]
    last = slice(ends[-2], None)
    for direction, dtype in product(DIRECTIONS, (torch.float64, torch.float32)):
        d = data(dtype=dtype)
        d.student[0, 1] = d.teacher[0, 1] = -torch.inf
        d.student[1, last] = d.teacher[1, last] = -torch.inf
        compare(f"{direction}, masks of both", d, ends, direction=direction, reduction="none")
        student, teacher = d.student.clone(), d.teacher.clone()
        (teacher if direction != "reverse" else student)[2, last] = -torch.inf
        compare(f"{direction}, of one", d._replace(student=student, teacher=teacher), ends, direction=direction,
                reduction="none")  # fmt: skip
        (student if direction != "reverse" else teacher)[3, last] = -torch.inf
        x, w = mine(student, ends), mine(teacher, ends)
        loss = parallel.kl_divergence(x, w, direction=direction, reduction="none", vocab_size=CLASSES)
        infinite = direction != "jsd"
        expect(bool(loss[3].isinf()) == infinite and bool(loss[:3].isfinite().all()), f"{direction}, infinite: {loss}")
        far = d._replace(student=d.student + 1000, teacher=d.teacher - 1000)
        compare(f"{direction}, far from 0", far, ends, direction=direction, reduction="none", slack=20)
        ignored(direction, dtype, ends)
    none = parallel.kl_divergence(
        mine(d.student, ends), mine(d.teacher, ends), labels=torch.full((21,), -100), vocab_size=CLASSES
    )
    expect(bool(none.isnan()), f"a mean of no rows: expected NaN, got {none}")


def ignored(direction: str, dtype: torch.dtype, ends: list[int]) -> None:
    """Rows that do not count may hold anything."""
    d = data(dtype=dtype)
    d.student[1::4], d.teacher[2::7] = torch.nan, torch.inf
    d.student[2::7], d.teacher[1::4] = torch.inf, torch.nan
    loss, grad = sharded(d, ends, "labels, weight", direction=direction)
    plain, of_plain = sharded(data(dtype=dtype), ends, "labels, weight", direction=direction)
    expect(torch.equal(loss, plain) and torch.equal(grad, of_plain), f"{direction}: ignored rows {loss}, {plain}")


def natively() -> None:
    """Where the kernels decline, on every rank or on one."""
    declines = _pair_rows.declines
    ends = cuts(CLASSES)["uneven"]
    for where in (lambda: True, lambda: dist.get_rank() == 0):
        _pair_rows.declines = lambda call, where=where: "as it were" if where() else declines(call)
        try:
            for direction, teacher_is in product(DIRECTIONS, TEACHERS):
                for dtype in (torch.float64, torch.float32):
                    d = data(dtype=dtype, teacher_is=teacher_is)
                    compare(f"{direction}, natively", d, ends, "labels, weight", direction=direction, temperature=1.7,
                            beta=0.3, teacher_is=teacher_is, slack=3)  # fmt: skip
                    ignored(direction, dtype, ends)
        finally:
            _pair_rows.declines = declines


def derivatives() -> None:
    """Of the second order, of weights and of teachers, and in torch.func."""
    ends = cuts(CLASSES)["uneven"]
    for direction, reduction in product(DIRECTIONS, ("batchmean", "none")):
        d = data((5,), torch.float64)
        options = {"direction": direction, "temperature": 1.7, "beta": 0.3}
        tangent = torch.randn(d.student.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

        def of_all(x: Tensor, w: Tensor, r: Tensor, options: Any = options, reduction: str = reduction) -> Tensor:
            return formulas.reduced(formulas.rows(x, w, **options), CLASSES, reduction, d.labels != -100, r)  # noqa: B023

        x, w, r = (each.detach().clone().requires_grad_() for each in (d.student, d.teacher, d.weight))
        loss = of_all(x, w, r)
        expected = torch.autograd.grad(loss, (x, w, r), upstream_of(loss), create_graph=True)
        (second,) = torch.autograd.grad((expected[0] * tangent).sum(), x)
        for of_teacher in (False, True):
            own, other = (mine(each, ends).detach().clone() for each in (d.student, d.teacher))
            own[1], other[1] = torch.nan, torch.inf  # an ignored row
            own.requires_grad_()
            factor = d.weight.detach().clone().requires_grad_()
            other.requires_grad_(of_teacher)
            loss = parallel.kl_divergence(
                own, other, labels=d.labels, weight=factor, reduction=reduction, **options, **sharding(ends)
            )
            inputs = [own, factor, *([other] if of_teacher else [])]
            got = torch.autograd.grad(loss, inputs, upstream_of(loss), create_graph=True)
            name = f"{direction}, {reduction}, of teacher {of_teacher}"
            within(f"{name}, first", got[0].detach(), mine(expected[0], ends), expected[0], 1e-12)
            counts = d.weight != 0  # a row of weight 0 is as an ignored one
            within(f"{name}, weight", got[1][counts], expected[2][counts], expected[2], 1e-12)
            if of_teacher:
                within(f"{name}, teacher", got[2], mine(expected[1], ends), expected[1], 1e-12)
            (own_second,) = torch.autograd.grad((got[0] * mine(tangent, ends)).sum(), own)
            within(f"{name}, second", own_second, mine(second, ends), second, 1e-10)

        def alone(x: Tensor, options: Any = options) -> Tensor:
            return parallel.kl_divergence(x, mine(d.teacher, ends), **options, **sharding(ends))  # noqa: B023

        x = d.student.clone().requires_grad_()
        (plain,) = torch.autograd.grad(formulas.rows(x, d.teacher, **options).mean(), x)
        within(
            f"{direction}, torch.func", torch.func.grad(alone)(mine(d.student, ends)), mine(plain, ends), plain, 1e-12
        )


def compiled() -> None:
    """Whole, with eager's results, and sizes that stay open."""
    ends = cuts(CLASSES)["uneven"]
    torch._dynamo.reset()

    def run(x: Tensor, w: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        return parallel.kl_divergence(x, w, direction="jsd", labels=labels, weight=weight, **sharding(ends))

    function = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (21, 34, 55):  # sizes that are equal become one
            d = data((rows,))
            results = []
            for each in (run, function):
                x = mine(d.student, ends).clone().requires_grad_()
                loss = each(x, mine(d.teacher, ends), d.labels, d.weight)
                results.append((loss.detach(), *torch.autograd.grad(loss, x)))
            torch.testing.assert_close(results[1], results[0], msg=lambda text, rows=rows: f"{rows} rows: {text}")


def memory() -> None:
    """The gradient, numbers of the rows, and for a mixture blocks of its terms."""
    ranks, rows, classes = dist.get_world_size(), 256, 16384
    ends = cuts(classes)["even"]
    d = data((rows,), torch.float32, classes=classes)
    x, w = mine(d.student, ends).clone().requires_grad_(), mine(d.teacher, ends).clone()
    gradient = x.numel() * 4
    for direction in DIRECTIONS:
        step = lambda direction=direction: parallel.kl_divergence(  # noqa: E731
            x, w, direction=direction, **sharding(ends)
        ).backward()
        step()
        x.grad = None
        taken = peak_bytes(step)
        x.grad = None
        terms = 2**16 * 8 * 16 if direction == "jsd" else 0
        most = gradient + 8 * 40 * rows * ranks + terms
        expect(gradient <= taken <= most, f"{direction}: expected {gradient} to {most} bytes, got {taken}")


def placements() -> None:
    """DTensors of functional.kl_divergence: by their shards, or natively, or raised; inside loss_parallel() too."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    ranks = dist.get_world_size()
    line = init_device_mesh("cpu", (ranks,))
    cases = [(line, [place]) for place in (Shard(2), Shard(1), Shard(0), Replicate())]
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "classes"))
        cases += [(square, [Shard(0), Shard(2)]), (square, [Shard(2), Replicate()])]
    for number, ((mesh, places), how, direction, reduction) in enumerate(
        product(cases, ("", "labels, weight"), DIRECTIONS, REDUCTIONS)
    ):
        teacher_is, dtype = TEACHERS[number % 3], (torch.float64, torch.bfloat16)[number // 4 % 2]
        d = data((8, 3), dtype, teacher_is)
        value, grad = exact(d, how, reduction, direction=direction, teacher_is=teacher_is)
        everywhere = [Replicate()] * mesh.ndim
        x = distribute_tensor(d.student, mesh, places).detach().requires_grad_()
        others = [everywhere, places][number // 2 % 2]
        w = distribute_tensor(d.teacher, mesh, others)
        rest = {name: distribute_tensor(each, mesh, everywhere) for name, each in of_rows(d, how).items()}
        with loss_parallel() if number // 3 % 2 else contextlib.nullcontext():
            loss = whole.kl_divergence(x, w, direction=direction, teacher_is=teacher_is, reduction=reduction, **rest)
            whole_loss = loss.full_tensor()
            (of_student,) = torch.autograd.grad(whole_loss, x, upstream_of(whole_loss))
        name = f"{places}, {how}, {direction}, {reduction}"
        expect(list(of_student.placements) == places, f"{name}: {of_student.placements}")
        of_rows_cut = [each if reduction == "none" else Partial() for each in places]
        wanted = [
            cut if each in (Shard(0), Shard(1)) else Replicate() for cut, each in zip(of_rows_cut, places, strict=True)
        ]
        expect(list(loss.placements) == wanted and loss.dtype == dtype, f"{name}: {loss.placements}, {loss.dtype}")
        within(f"{name}, value", whole_loss.detach(), value, value.abs() + 1, 2 * LIMITS[dtype])
        within(f"{name}, gradient", of_student.full_tensor(), grad, grad, 2 * LIMITS[dtype])
    d = data((8,), torch.float64)
    x, w = (distribute_tensor(each, line, [Shard(1)]).requires_grad_() for each in (d.student, d.teacher))
    loss = whole.kl_divergence(x, w)  # natively
    plain = [each.clone().requires_grad_() for each in (d.student, d.teacher)]
    expected = torch.autograd.grad(whole.kl_divergence(*plain), plain)
    for got, each in zip(torch.autograd.grad(loss, (x, w)), expected, strict=True):
        within("a teacher's gradient", got.full_tensor(), each, each, 1e-12)
    with loss_parallel():
        raises(RuntimeError, "leave loss_parallel", lambda: whole.kl_divergence(x, w))
        raises(RuntimeError, "leave loss_parallel", lambda: whole.kl_divergence(x, w.detach(), return_lse=True))
    raises(RuntimeError, "mixed torch.Tensor and DTensor", lambda: whole.kl_divergence(x, d.teacher))
    raises(RuntimeError, "pass student_logits.to_local()", lambda: parallel.kl_divergence(x, d.teacher))
    raises(RuntimeError, "pass teacher.full_tensor()", lambda: whole.linear_kl_divergence(d.student, torch.eye(13), w))


def errors() -> None:
    """The same on every rank, and the next call is right."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    classes = 3 * ranks - 1
    ends = cuts(classes)["even"]
    d = data((8,), torch.float32, classes=classes)
    x, w = mine(d.student, ends), mine(d.teacher, ends)
    last = rank == ranks - 1

    def run(x: Tensor = x, w: Any = w, **options: Any) -> Any:
        return parallel.kl_divergence(x, w, **{"vocab_size": classes, **options})

    follow = "expected the ranks' classes to follow each other from 0 to the same vocab_size"
    alike = "expected the same arguments, labels to ignore and weights of 0, and teachers"
    ignored = torch.full((8,), -100 if last else 0)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, follow, lambda: run(vocab_size=None)),  # the last rank holds one class less
        (ValueError, follow, lambda: run(vocab_start=ends[rank] - (rank > 0))),
        (ValueError, "one dtype on every rank", lambda: run(x.bfloat16() if last else x)),
        (ValueError, alike, lambda: run(w=w.bfloat16() if last else w)),
        (ValueError, alike, lambda: run(w=w[:, :-1] if last else w)),
        (ValueError, alike, lambda: run(labels=ignored)),
        (ValueError, alike, lambda: run(weight=(torch.arange(8) - int(last)).float())),
        (ValueError, alike, lambda: run(direction="jsd" if last else "forward")),
        (ValueError, alike, lambda: run(temperature=2.0 if last else 1.0)),
        (ValueError, alike, lambda: run(direction="jsd", beta=0.25 if last else 0.5)),
        (ValueError, alike, lambda: run(reduction="sum" if last else "mean")),
        (ValueError, alike, lambda: run(teacher_is="log_probs" if last else "logits")),
        (ValueError, alike, lambda: run(w=w.clone().requires_grad_(last))),
        (ValueError, "expected a teacher of the", lambda: run(w=torch.zeros(8, classes + 1))),
        (ValueError, "of the same rows", lambda: run(w=w[:7])),
        (ValueError, "labels must be of the rows' shape (8,)", lambda: run(labels=torch.zeros(7).long())),
        (ValueError, "direction must be one of", lambda: run(direction="backward")),
        (ValueError, "temperature must be positive, got 0", lambda: run(temperature=0)),
        (ValueError, "beta must be from 0 to 1, got 2.0", lambda: run(beta=2.0)),
        (TypeError, "argument 'temperature' must be float, not a tensor", lambda: run(temperature=torch.tensor(2.0))),
        (TypeError, "argument 'teacher' must be Tensor, not tuple", lambda: run(w=(w, w))),
        (ValueError, "student_logits must be of a floating point dtype", lambda: run(x.int())),
        (TypeError, "group must be a ProcessGroup or a DeviceMesh, not str", lambda: run(group="all")),
    ]
    for kind, words, call in cases:
        raises(kind, words, call)
    torch.testing.assert_close(run(), whole.kl_divergence(d.student, d.teacher))
    for direction, second in (("forward", ""), ("jsd", " and one of 128")):
        path = fusedloss.explain(parallel.kl_divergence, x, w, direction=direction, vocab_size=classes)
        expect(
            path.startswith("fused: cpu") and f"classes {ends[rank]} to {ends[rank + 1]} of {classes}" in path
            and f"an all_gather of {4 * (5 * 8 + 10)} bytes{second} from each of {ranks} ranks" in path, path,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(globals(), *sys.argv[1:]))
