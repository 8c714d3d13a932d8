"""Losses over a sharded vocabulary in processes of their own, which meet over gloo.

python vocabulary_ranks.py RANKS FOLDER CHECK...    runs checks; what fails is printed, and ends the process

Every rank runs the same checks. A check is a function of this file.
"""

import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from observe import peak_bytes
from processes import LIMITS, Collectives, cuts, error, expect, main, mine, raises, same_bits, sharding, within
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from vocabulary_calls import CALLS, IGNORED, Call, Data, data, outputs, weighed

import fusedloss
import fusedloss.functional as whole
from fusedloss import parallel
from fusedloss.parallel import _exchange, _local
from fusedloss.parallel._row import Asked


def whole_results(call: Call, d: Data) -> tuple[list[Tensor], Tensor]:
    """In one process and float64."""
    wide = Data(d.logits.detach().double().clone(), d.target, d.weight.double(), d.rows.double())
    x = wide.logits.requires_grad_()
    results = call.run(whole, x, wide)
    weighed(results).backward()
    assert x.grad is not None
    return [each.detach().double() for each in outputs(results)], x.grad


def sharded_results(call: Call, d: Data, ends: list[int], cut: str = "") -> tuple[list[Tensor], Tensor]:
    x = mine(d.logits, ends).detach().requires_grad_()
    results = call.run(parallel, x, d, **sharding(ends, cut))
    weighed(results).backward()
    assert x.grad is not None
    return [each.detach() for each in outputs(results)], x.grad


def compare(name: str, call: Call, d: Data, ends: list[int], cut: str = "", slack: float = 1) -> None:
    dtype = d.logits.dtype
    values, gradient = whole_results(call, d)
    got, of_logits = sharded_results(call, d, ends, cut)
    same_bits(name, got)
    pairs = [*zip(got, values, values, strict=True), (of_logits, mine(gradient, ends), gradient)]
    for place, (found, exact, scale) in enumerate(pairs):
        limit = slack * max(LIMITS[dtype], LIMITS[found.dtype])
        within(f"{name}, result {place + 1} of {len(pairs)}", found, exact, scale, limit)


# ---- checks


def values(dtypes: tuple[torch.dtype, ...] = tuple(LIMITS)) -> None:
    """Every call against one process, over even, uneven and empty shards."""
    for dtype in dtypes:
        for number, (name, call) in enumerate(CALLS.items()):
            d = data((21, 13), dtype, seed=number, masked=call.masked)
            for cut, ends in cuts(13).items():
                compare(f"{name}, {dtype}, {cut}", call, d, ends, cut)


def few_values() -> None:
    """The calls that differ most, over uneven shards."""
    for name in ("mean", "lse", "smoothing, all", "focal, row weights", "temperature, entropy"):
        for dtype in (torch.float64, torch.bfloat16):
            call = CALLS[name]
            compare(f"{name}, {dtype}", call, data((21, 13), dtype, masked=call.masked), cuts(13)["uneven"])


def long_rows() -> None:
    """Rows that the kernels cut into parts, and where they leave out what is not asked for."""
    for name in ("mean", "smoothing, all", "focal", "entropy"):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            call = CALLS[name]
            compare(f"{name}, long rows", call, data((5, 9001), dtype, masked=call.masked), cuts(9001)["even"])


def shapes() -> None:
    """One row, rows of several dimensions, and logits whose classes lie next to each other or not."""
    for number, (name, call) in enumerate(CALLS.items()):
        for shape in ((13,), (3, 13, 5), (2, 13, 3, 4)):
            d = data(shape, torch.float64, seed=number, masked=call.masked)
            compare(f"{name}, {shape}", call, d, cuts(13)["uneven"])
        d = data((2, 13, 3, 4), torch.float32, seed=number, masked=call.masked)
        d = d._replace(logits=d.logits.contiguous(memory_format=torch.channels_last))
        compare(f"{name}, channels last", call, d, cuts(13)["uneven"])


def one_class() -> None:
    """On every rank, and in all."""
    ranks = dist.get_world_size()
    for name, call in CALLS.items():
        d = data((21, ranks), torch.float64, masked=call.masked)
        compare(f"{name}, one class a rank", call, d, list(range(ranks + 1)))
        compare(f"{name}, one class", call, data((9, 1), torch.float64), [0] + [1] * ranks)


def masks() -> None:
    """A rank whose classes are all masked, a masked target, and a mask of the classes that have no weight."""
    ends = cuts(13)["even"]
    for name, call in CALLS.items():
        d = data((21, 13), torch.float64, masked=False)
        if not call.masked:
            d = d._replace(weight=d.weight.clone())
            d.weight[ends[-2] :] = 0
            d.target[d.target >= ends[-2]] = 0
            if "all" not in name:  # without weights
                continue
        d.logits[:7, ends[-2] :] = -torch.inf
        d.target[:7] = 0
        compare(f"{name}, a rank of masks", call, d, ends)
        if call.masked:
            d.logits[8, 5], d.target[8] = -torch.inf, 5
            compare(f"{name}, a masked target", call, d, ends)


def edges() -> None:
    """Large logits, all rows ignored or none there, and rows that count nowhere although they are no numbers."""
    ends = cuts(13)["even"]
    for name, call in CALLS.items():
        d = data((21, 13), torch.float32, masked=call.masked)
        if not any(each in name for each in ("softcap", "all", "temperature")):  # of which these leave few digits
            compare(f"{name}, large logits", call, d._replace(logits=d.logits + 1000), ends)
    for name, call in CALLS.items():
        d = data((8, 13), torch.float64, masked=False)
        compare(f"{name}, all ignored", call, d._replace(target=torch.full_like(d.target, IGNORED)), ends)
        d = data((8, 13), torch.float64, masked=False)
        d.logits[2] = torch.nan
        d.target[2] = IGNORED
        if "lse" not in name and "all" not in name:
            compare(f"{name}, ignored numbers", call, d, ends)
    x = mine(data((8, 13), torch.float64).logits, ends).clone().requires_grad_()
    loss = parallel.cross_entropy(x, torch.full((8,), IGNORED), all_ignored="zero", vocab_size=13)
    loss.backward()
    expect(loss.item() == 0 and not x.grad.any(), f"expected a loss and a gradient of 0, got {loss}, {x.grad}")
    none = torch.zeros(0, ends[dist.get_rank() + 1] - ends[dist.get_rank()], requires_grad=True)
    loss = parallel.cross_entropy(none, torch.zeros(0, dtype=torch.int64), vocab_size=13)
    loss.backward()
    expect(bool(loss.isnan()) and none.grad.shape == none.shape, f"expected NaN of no rows, got {loss}")
    d = data((8, 13), torch.float64)
    index = torch.tensor([True, False] * 4)
    for ignore in (index, [3, 5], 4):
        exact = whole.cross_entropy(d.logits, d.target.clamp_min(0), ignore_index=ignore)
        got = parallel.cross_entropy(mine(d.logits, ends), d.target.clamp_min(0), ignore_index=ignore, vocab_size=13)
        expect(abs(float(got - exact)) < 1e-12, f"ignore_index {ignore}: expected {exact}, got {got}")


def collectives() -> None:
    """One all_gather of 3 or 4 numbers a row and ten more; backward communicates nothing."""
    ends = cuts(13)["even"]
    for name, call in CALLS.items():
        for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 4)):
            d = data((21, 13), dtype, masked=call.masked)
            x = mine(d.logits, ends).clone().requires_grad_()
            with Collectives() as forward:
                results = weighed(call.run(parallel, x, d, **sharding(ends)))
            expect(
                forward.sent == [("_c10d_functional.all_gather_into_tensor.default", size * (21 * call.numbers + 10))],
                f"{name}, {dtype}: {forward.sent}",
            )
            with Collectives() as backward:
                results.backward()
            expect(not backward.sent, f"{name}, {dtype}, backward: {backward.sent}")


def in_blocks() -> None:
    """An all_to_all and an all_gather where a rule of bytes says so: here always, also of rows that do not divide."""
    rule, ranks = _exchange.in_blocks, dist.get_world_size()
    _exchange.in_blocks = lambda *_: True
    try:
        for name, call in CALLS.items():
            for rows in (21, 2 * ranks, 1):
                for dtype in (torch.float64, torch.bfloat16):
                    d = data((rows, 13), dtype, seed=rows, masked=call.masked)
                    for cut, ends in cuts(13).items():
                        compare(f"{name}, {rows} rows in blocks, {dtype}, {cut}", call, d, ends, cut)
            compare(f"{name}, dims in blocks", call, data((2, 13, 3), torch.float64, masked=False), cuts(13)["uneven"])
            d = data((21, 13), torch.float32, masked=call.masked)
            with Collectives() as forward:
                call.run(parallel, mine(d.logits, cuts(13)["even"]), d, **sharding(cuts(13)["even"]))
            each = -(-21 // ranks)
            sent = [
                ("_c10d_functional.all_to_all_single.default", 4 * ranks * (each * call.numbers + 10)),
                ("_c10d_functional.all_gather_into_tensor.default", 4 * each * call.numbers),
            ]
            expect(forward.sent == sent, f"{name}: {forward.sent}")
        natively()
        errors(told="an all_to_all and an all_gather")
        ends = cuts(13)["even"]
        none = torch.zeros(0, ends[dist.get_rank() + 1] - ends[dist.get_rank()], requires_grad=True)
        loss = parallel.cross_entropy(none, torch.zeros(0, dtype=torch.int64), reduction="sum", vocab_size=13)
        loss.backward()
        expect(loss.item() == 0, f"expected 0 of no rows, got {loss}")
    finally:
        _exchange.in_blocks = rule
    for ranks, blocks in ((2, False), (8, False), (9, True), (512, True)):
        expect(rule(12, 16384, ranks) == blocks, f"12 bytes of 16384 rows on {ranks} ranks: expected {blocks}")
    expect(not rule(12, 512, 64), "12 bytes of 512 rows on 64 ranks: expected one round")


def accounting() -> None:
    """What benchmarks/sharded_scale.py says of a step is what is sent."""
    from benchmarks.sharded_scale import ours

    rule, ranks, ends = _exchange.in_blocks, dist.get_world_size(), cuts(13)["even"]
    for in_blocks in (False, True):
        _exchange.in_blocks = lambda *_, in_blocks=in_blocks: in_blocks
        try:
            for smoothing in (0.0, 0.1):
                d = data((6 * ranks, 13), torch.float32, masked=False)
                with Collectives() as collectives:
                    parallel.cross_entropy(
                        mine(d.logits, ends), d.target, label_smoothing=smoothing, **sharding(ends)
                    )  # fmt: skip
                received = [
                    size * (ranks - 1) // (ranks if "all_to_all" in name else 1) for name, size in collectives.sent
                ]
                step = ours(6 * ranks, ranks, Asked(spread=smoothing > 0))
                expect((step.rounds, step.bytes) == (len(received), sum(received)), f"{step}, {received}")
        finally:
            _exchange.in_blocks = rule


def groups() -> None:
    """Another group than that of all, in another order of ranks, and a mesh."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    d = data((21, 13), torch.float64)
    exact = whole.cross_entropy(d.logits, d.target)
    pair = dist.new_group([ranks - 2, ranks - 1])
    if rank >= ranks - 2:
        x = d.logits[:, :7] if rank == ranks - 2 else d.logits[:, 7:]
        got = parallel.cross_entropy(x, d.target, group=pair, vocab_size=13)
        expect(abs(float(got - exact)) < 1e-12, f"a group of two: expected {exact}, got {got}")
    else:
        raises(
            ValueError, "a group that this rank belongs to",
            lambda: parallel.cross_entropy(d.logits, d.target, group=pair),
        )  # fmt: skip
    alone = [dist.new_group([each]) for each in range(ranks)][rank]
    got = parallel.cross_entropy(d.logits, d.target, group=alone)
    expect(abs(float(got - exact)) < 1e-12, f"a group of one: expected {exact}, got {got}")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,))
    got = parallel.cross_entropy(mine(d.logits, cuts(13)["even"]), d.target, group=mesh, vocab_size=13)
    expect(abs(float(got - exact)) < 1e-12, f"a mesh: expected {exact}, got {got}")
    if ranks % 2 == 0:
        mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("rows", "classes"))
        place = mesh.get_local_rank("classes")
        got = parallel.cross_entropy(
            d.logits[:, 7 * place : 7 + 6 * place], d.target, group=mesh["classes"], vocab_size=13
        )
        expect(abs(float(got - exact)) < 1e-12, f"a mesh of two dimensions: expected {exact}, got {got}")


def derivatives() -> None:
    """gradcheck in a group of one, second derivatives of several ranks, several backwards, and torch.func."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([each]) for each in range(ranks)][rank]
    ends = cuts(13)["uneven"]
    for name, call in CALLS.items():
        if name == "float32":
            continue
        d = data((6, 5), torch.float64, masked=False)
        x = d.logits.clone().requires_grad_()
        x.data[0] /= 20  # a confident row has no second derivative to speak of

        def run(x: Tensor, call: Call = call, d: Data = d) -> Any:
            return call.run(parallel, x, d, group=alone)

        torch.autograd.gradcheck(run, x, check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(run, x)
        exact = torch.func.grad(lambda x, call=call, d=d: weighed(call.run(whole, x, d)))(x.detach())
        got = torch.func.grad(lambda x, run=run: weighed(run(x)))(x.detach())
        expect(error(got, exact, exact) < 1e-12, f"{name}, torch.func.grad: expected {exact}, got {got}")

        d = data((21, 13), torch.float64, masked=False)
        v = torch.randn(21, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        second = []
        for f, x, v_of, options in (
            (whole, d.logits, v, {}),
            (parallel, mine(d.logits, ends), mine(v, ends), sharding(ends)),
        ):
            x = x.clone().requires_grad_()
            value = weighed(call.run(f, x, d, **options))
            (first,) = torch.autograd.grad(value, x, create_graph=True)
            (made,) = torch.autograd.grad((first * v_of).sum(), x, retain_graph=True)
            second.append(made)
            (again,) = torch.autograd.grad(value, x, retain_graph=True)
            (last,) = torch.autograd.grad(value, x)
            expect(torch.equal(again, last), f"{name}: expected a second backward to be as the first")
            expect(error(first, last, last) < 1e-12, f"{name}: expected create_graph to change no gradient")
        exact = mine(second[0], ends)
        expect(error(second[1], exact, second[0]) < 1e-12, f"{name}, twice: expected {exact}, got {second[1]}")


def derivatives_of_factors() -> None:
    """What every rank has whole may require a gradient, and its gradient is whole on every rank."""
    ends = cuts(13)["uneven"]
    d = data((21, 13), torch.float64)
    found = []
    for f, x, options in ((whole, d.logits, {}), (parallel, mine(d.logits, ends), sharding(ends))):
        rows, z_loss, gamma = (each.clone().requires_grad_() for each in (d.rows, torch.tensor(0.1), torch.tensor(2.0)))
        loss = f.cross_entropy(x, d.target, sample_weight=rows, z_loss=z_loss, **options)
        loss = loss + f.focal_loss(x, d.target, gamma=gamma, **options)
        found.append(torch.autograd.grad(loss, (rows, z_loss, gamma)))
    for got, exact in zip(found[1], found[0], strict=True):
        expect(error(got, exact.double(), exact.double()) < 1e-6, f"expected {exact}, got {got}")


def memory() -> None:
    """What a step allocates beyond the logits is their gradient, and some numbers a row."""
    ends = cuts(8000)["even"]
    for dtype, (name, call) in product((torch.bfloat16, torch.float32), CALLS.items()):
        d = data((256, 8000), dtype, masked=False)
        x = mine(d.logits, ends).clone().requires_grad_()
        peak = peak_bytes(lambda x=x, call=call, d=d: weighed(call.run(parallel, x, d, **sharding(ends))).backward())
        expect(peak < 1.1 * x.nbytes + 2**17, f"{name}, {dtype}: {peak} bytes beyond logits of {x.nbytes}")


def situations() -> None:
    """Under autocast and checkpointing, with float32 results, the same dtypes and numbers as the whole loss."""
    ends = cuts(13)["uneven"]
    for name, call in CALLS.items():
        d = data((21, 13), torch.bfloat16, masked=call.masked)
        with torch.autocast("cpu", torch.bfloat16):
            exact, got = call.run(whole, d.logits, d), call.run(parallel, mine(d.logits, ends), d, **sharding(ends))
        for found, wanted in zip(outputs(got), outputs(exact), strict=True):
            torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}, autocast: {text}")
        d = data((21, 13), torch.float64, masked=call.masked)
        x, y = (mine(d.logits, ends).clone().requires_grad_() for _ in range(2))
        weighed(call.run(parallel, x, d, **sharding(ends))).backward()

        def run(y: Tensor, call: Call = call, d: Data = d) -> Tensor:
            return weighed(call.run(parallel, y, d, **sharding(ends)))

        checkpoint(run, y, use_reentrant=False).backward()
        expect(torch.equal(x.grad, y.grad), f"{name}: expected checkpointing to change nothing")


def placements() -> None:
    """DTensor logits in functional's losses: classes, rows, both and neither over a mesh, inside torch's loss_parallel
    and outside of it. Nothing is gathered but the numbers of rows, and the mean is that of all rows."""
    from contextlib import nullcontext

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    ranks = dist.get_world_size()
    cases = [(init_device_mesh("cpu", (ranks,)), [[Shard(1)], [Shard(-1)], [Shard(0)], [Replicate()]])]
    if ranks % 2 == 0:
        mesh = init_device_mesh("cpu", (ranks // 2, 2))
        cases.append((mesh, [[Shard(0), Shard(1)], [Shard(1), Replicate()], [Replicate(), Shard(0)], [Shard(0)] * 2]))
    for mesh, places in cases:
        whole_of = [Replicate()] * mesh.ndim
        for name, call in CALLS.items():
            for place, context in product(places, (nullcontext, loss_parallel)):
                d = data((7 * ranks - 1, 13), torch.float64, masked=call.masked)
                values, gradient = whole_results(call, d)
                x = distribute_tensor(d.logits.detach().clone(), mesh, place).requires_grad_()
                others = Data(x, *[distribute_tensor(each, mesh, whole_of) for each in d[1:]])
                label = f"{name}, {place}, {context.__name__}"
                with context(), Collectives() as collectives:
                    results = outputs(call.run(whole, x, others))
                over_classes = any(each in (Shard(1), Shard(-1)) for each in place)
                sent = [op for op, _ in collectives.sent]
                gathers = ["_c10d_functional.all_gather_into_tensor.default"] * over_classes
                counts = len([op for op in sent if "all_reduce" in op])
                expect([op for op in sent if "all_reduce" not in op] == gathers, f"{label}: {sent}")
                expect(counts in (0, place.count(Shard(0))), f"{label}: {sent}")
                summed = results[0].dim() == 0
                expected = [Partial() if each == Shard(0) and summed else each for each in place]
                expected = [Replicate() if each in (Shard(1), Shard(-1)) else each for each in expected]
                expect(results[0].placements == tuple(expected), f"{label}: {results[0].placements}")
                for found, exact in zip(results, values, strict=True):
                    limit = 1e-12 if found.dtype == torch.float64 else 1e-6
                    off = error(found.full_tensor(), exact, exact)
                    expect(off < limit, f"{label}: off by {off:.1e}")
                # Not by x.grad, in which torch 2.11 keeps an uneven shard's gradient whole.
                (of_x,) = torch.autograd.grad(weighed(tuple(each.full_tensor() for each in results)), x)
                off = error(of_x.full_tensor(), gradient, gradient)
                expect(off < limit, f"{label}, gradient: off by {off:.1e}")
                expect(of_x.placements == x.placements, f"{label}: {of_x.placements}")
                if name in ("class weights", "focal, row weights"):
                    large_sums(label, call, lambda each, mesh=mesh, place=place: distribute_tensor(each, mesh, place))


def weights_of_dtensors() -> None:
    """Weights of rows that require a gradient have that of the mean over all rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    d = data((8 * dist.get_world_size(), 13), torch.float64)
    rows = d.rows.clone().requires_grad_()
    (exact,) = torch.autograd.grad(whole.cross_entropy(d.logits, d.target, sample_weight=rows), rows)
    for place in (Shard(1), Shard(0)):
        x = distribute_tensor(d.logits, mesh, [place])
        t, s = (distribute_tensor(each, mesh, [Replicate()]) for each in (d.target, d.rows))
        s.requires_grad_()
        (got,) = torch.autograd.grad(whole.cross_entropy(x, t, sample_weight=s).full_tensor(), s)
        off = error(got.full_tensor(), exact, exact)
        expect(off < 1e-12, f"{place}: off by {off:.1e}")


def labels_of_dtensors() -> None:
    """A label out of range is raised on every rank inside loss_parallel, too, where torch's loss of it is 0."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(torch.randn(4, 13), mesh, [Shard(1)])
    t = distribute_tensor(torch.tensor([0, 13, 1, 2]), mesh, [Replicate()])
    with loss_parallel():
        raises(IndexError, "Target 13 is out of bounds.", lambda: whole.cross_entropy(x, t))


def compiled_placements() -> None:
    """In one graph each, with the numbers of one process; and a DTensor's second derivative."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch._dynamo.reset()
    run = torch.compile(
        lambda x, t: whole.cross_entropy(x, t, label_smoothing=0.1).full_tensor(), fullgraph=True, backend="aot_eager"
    )
    d = data((21, 13), torch.float64, masked=False)
    t = distribute_tensor(d.target, mesh, [Replicate()])
    for place in (Shard(1), Shard(0), Replicate()):
        x = distribute_tensor(d.logits, mesh, [place]).requires_grad_()
        y = d.logits.clone().requires_grad_()
        exact = whole.cross_entropy(y, d.target, label_smoothing=0.1)
        (of_y,) = torch.autograd.grad(exact, y, create_graph=True)
        got = run(x, t)
        got.backward()
        expect(abs(float(got.detach() - exact.detach())) < 1e-12, f"{place}, compiled: expected {exact}, got {got}")
        off = error(x.grad.full_tensor(), of_y.detach(), of_y.detach())
        expect(off < 1e-12, f"{place}, compiled gradient: off by {off:.1e}")
        loss = whole.cross_entropy(x, t, label_smoothing=0.1).full_tensor()
        (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
        (twice,) = torch.autograd.grad(of_x.full_tensor().square().sum(), x)
        (exact,) = torch.autograd.grad(of_y.square().sum(), y)
        off = error(twice.full_tensor(), exact, exact)
        expect(off < 1e-12, f"{place}, second derivative: off by {off:.1e}")


def large_sums(label: str, call: Call, placed: Callable[[Tensor], Any]) -> None:
    """Means in float16 whose sum is beyond it."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    d = data((90, 13), torch.float16, masked=False)
    d = d._replace(logits=(3000 * d.logits.float()).clamp(-6e4, 6e4).half())
    x = placed(d.logits)
    everywhere = [Replicate()] * x.device_mesh.ndim
    found = call.run(whole, x, Data(x, *[distribute_tensor(each, x.device_mesh, everywhere) for each in d[1:]]))
    exact = call.run(whole, d.logits, d)
    off = error(found.full_tensor(), exact.double(), exact.double())
    expect(
        found.dtype == exact.dtype and bool(exact.isfinite()) and off < 2**-9, f"{label}, float16: {off:.1e}, {exact}"
    )


def natively() -> None:
    """Where the kernels decline, on every rank or on one."""
    declines = _local.declines
    ends = cuts(13)["uneven"]
    for where in (lambda: True, lambda: dist.get_rank() == 0):
        _local.declines = lambda *call, where=where: "as it were" if where() else declines(*call)
        try:
            for name, call in CALLS.items():
                for dtype in (torch.float64, torch.float32):
                    d = data((21, 13), dtype, masked=call.masked)
                    compare(f"{name}, natively", call, d, ends, slack=3)  # autograd takes p - 1 for -q
                    if dtype == torch.float64:
                        second_alike(name, call, d, ends)
        finally:
            _local.declines = declines


def second_alike(name: str, call: Call, d: Data, ends: list[int]) -> None:
    """A rank alone runs natively, and no rank waits for another that does not communicate."""
    x = mine(d.logits, ends).clone().requires_grad_()
    (first,) = torch.autograd.grad(weighed(call.run(parallel, x, d, **sharding(ends))), x, create_graph=True)
    (second,) = torch.autograd.grad(first.nan_to_num().square().sum(), x)
    expect(second.shape == x.shape, name)


def compiled() -> None:
    """Whole, without a break, with the kernels and one all_gather in the graph."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    ends = cuts(13)["empty"] if dist.get_world_size() > 2 else cuts(13)["uneven"]
    for name in ("mean", "lse", "smoothing, all", "focal, row weights", "temperature, entropy"):
        call = CALLS[name]
        for dtype in (torch.float64, torch.bfloat16):
            d = data((21, 13), dtype, masked=call.masked)
            torch._dynamo.reset()
            x, y = (mine(d.logits, ends).clone().requires_grad_() for _ in range(2))
            names: list[str] = []

            def record(graph: torch.fx.GraphModule, _: Any, names: list[str] = names) -> Any:
                names += [str(node.target) for node in graph.graph.nodes]
                return make_boxed_func(graph.forward)

            options = sharding(ends)
            run = torch.compile(
                lambda x, call=call, d=d, options=options: call.run(parallel, x, d, **options),
                fullgraph=True, backend=aot_autograd(fw_compiler=record),
            )  # fmt: skip
            got = run(x)
            exact = call.run(parallel, y, d, **sharding(ends))
            for found, wanted in zip(outputs(got), outputs(exact), strict=True):
                torch.testing.assert_close(found, wanted, msg=lambda text, name=name: f"{name}, compiled: {text}")
            weighed(got).backward()
            weighed(exact).backward()
            torch.testing.assert_close(x.grad, y.grad, msg=lambda text, name=name: f"{name}, compiled: {text}")
            fused = [name for name in names if name.startswith("fusedloss.") and "nll" not in name]
            sent = [name for name in names if "all_gather" in name]
            expect(bool(fused) == (x.numel() > 0) and len(sent) == 1, f"{name}, compiled: {names}")
            backward = any("_backward" in name for name in fused)
            expect(backward == (x.numel() > 0), f"{name}, compiled backward: {names}")
    sizes_stay_open()
    torch._dynamo.reset()
    run = torch.compile(lambda x, t: parallel.cross_entropy(x, t, vocab_size=13), fullgraph=True, backend="aot_eager")
    x = mine(torch.randn(3, 13), cuts(13)["even"])
    raises(IndexError, "Target 13 is out of bounds.", lambda: run(x, torch.tensor([0, 13, 1])))
    loss = run(x, torch.tensor([0, dist.get_rank(), 1]))
    expect(bool(loss.isnan()), f"expected NaN where the ranks' targets differ, got {loss}")


def sizes_stay_open() -> None:
    torch._dynamo.reset()
    ends = cuts(13)["even"]
    run = torch.compile(
        lambda x, t: parallel.cross_entropy(x, t, label_smoothing=0.1, vocab_size=13),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (21, 34, 55):  # sizes that are equal become one
            d = data((rows, 13), torch.float64, masked=False)
            got = run(mine(d.logits, ends), d.target)
            exact = whole.cross_entropy(d.logits, d.target, label_smoothing=0.1)
            expect(abs(float(got - exact)) < 1e-12, f"{rows} rows, compiled: expected {exact}, got {got}")


def errors(told: str = "an all_gather") -> None:
    """The same on every rank, and the next call is right."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    classes = 3 * ranks - 1
    ends = cuts(classes)["even"]
    d = data((8, classes), torch.float32)
    x, t = mine(d.logits, ends), d.target
    start = ends[rank]

    def run(x: Tensor = x, t: Any = t, *more: Any, **options: Any) -> Any:
        return parallel.cross_entropy(x, t, *more, **{"vocab_size": classes, **options})

    follow = "expected the ranks' classes to follow each other from 0 to the same vocab_size"
    last = rank == ranks - 1
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, follow, lambda: run(vocab_size=None)),  # the last rank holds one class less
        (ValueError, follow, lambda: run(vocab_size=classes + 1, vocab_start=start + (rank > 0))),
        (ValueError, follow, lambda: run(vocab_start=start - (rank > 0))),
        (ValueError, follow, lambda: run(vocab_start=start, vocab_size=classes + last)),
        (ValueError, follow, lambda: run(x, t.clamp_max(0), d.weight, vocab_size=classes + last)),
        (ValueError, follow, lambda: run(x, t.clamp_max(classes), vocab_start=classes + 5)),
        (ValueError, "one dtype on every rank", lambda: run(x.bfloat16() if last else x)),
        (ValueError, "the same target", lambda: run(x, t.roll(1) if last else t)),
        (ValueError, "the same target", lambda: run(x, t, None, None, 0 if last else -100)),
        (IndexError, f"Target {classes} is out of bounds.", lambda: run(x, torch.full_like(t, classes))),
        (IndexError, "Target -1 is out of bounds.", lambda: run(x, torch.full_like(t, -1))),
        (IndexError, "Target 255 is out of bounds.", lambda: run(x, torch.full_like(t, 255).byte())),
        (ValueError, "Expected input batch_size (8) to match target batch_size (7).", lambda: run(x, t[:7])),
        (RuntimeError, "but got Int", lambda: run(x, t.int())),
        (RuntimeError, "should be defined either for all", lambda: run(x, t, torch.ones(classes + 1))),
        (RuntimeError, "requires no gradient", lambda: run(x, t, torch.ones(classes, requires_grad=True))),
        (RuntimeError, "label_smoothing must be between 0.0 and 1.0", lambda: run(label_smoothing=1.5)),
        (TypeError, "argument 'softcap' must be float", lambda: run(softcap=torch.tensor(9.0))),
        (TypeError, "argument 'label_smoothing' must be float, not str", lambda: run(label_smoothing="no")),
        (ValueError, "softcap must be positive", lambda: run(softcap=-1.0)),
        (ValueError, "all_ignored must be", lambda: run(all_ignored="none")),
        (ValueError, "is not a valid value for reduction", lambda: run(reduction="all")),
        (ValueError, "out_dtype must be a floating point type", lambda: run(out_dtype=torch.int64)),
        (ValueError, "vocab_start needs vocab_size", lambda: run(vocab_start=0, vocab_size=None)),
        (TypeError, "vocab_size must be an int, not float", lambda: run(vocab_size=5.0)),
        (TypeError, "group must be a ProcessGroup or a DeviceMesh, not str", lambda: run(group="all")),
        (TypeError, "expected class indices", lambda: run(x, d.logits)),
        (TypeError, "argument 'target' must be Tensor, not list", lambda: run(x, [0, 1])),
        (RuntimeError, "expected logits of a floating point dtype", lambda: run(x.int())),
        (ValueError, "sample_weight must be of the rows' shape", lambda: run(sample_weight=torch.ones(3))),
        (ValueError, "gamma must be at least 0", lambda: parallel.focal_loss(x, t, gamma=-1.0)),
        (ValueError, "temperature must be positive", lambda: parallel.log_probs(x, t, temperature=0.0)),
    ]
    for kind, words, call in cases:
        raises(kind, words, call)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    placed = distribute_tensor(d.logits, init_device_mesh("cpu", (ranks,)), [Shard(1)])
    raises(RuntimeError, "pass input.to_local()", lambda: run(placed, t))
    torch.testing.assert_close(run(), whole.cross_entropy(d.logits, t))
    path = fusedloss.explain(parallel.cross_entropy, x, t, vocab_size=classes)
    sent = 4 * (3 * 8 + 10)
    expect(
        path.startswith("fused: cpu") and f"classes {start} to {ends[rank + 1]} of {classes}" in path
        and f"{told} of {sent} bytes" in path, path,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(globals(), *sys.argv[1:]))
