"""Linear cross-entropy over a sharded head in processes of their own, which meet over gloo.

python linear_ranks.py RANKS FOLDER CHECK...    runs checks; what fails is printed, and ends the process
"""

import sys
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from observe import peak_bytes
from processes import Collectives, cuts, error, expect, main, raises, same_bits, sharding, within
from torch import Tensor
from vocabulary_calls import IGNORED, outputs, weighed

import fusedloss
import fusedloss.functional as whole
from fusedloss import parallel
from fusedloss.parallel import _exchange

# Relative to the largest value or gradient. Of half types a product is rounded on each rank, and then their sum.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
FEATURES, CLASSES = 5, 13

# Beside each, how many numbers of a row a rank sends, and whether forward makes the gradients.
CALLS: dict[str, tuple[dict[str, Any], int, bool]] = {
    "mean": ({}, 3, True),
    "sum": ({"reduction": "sum"}, 3, True),
    "none": ({"reduction": "none"}, 3, False),
    "class weights": ({"weight": "classes"}, 3, True),
    "row weights": ({"weight": "classes", "sample_weight": "rows"}, 3, True),
    "row weights, none": ({"sample_weight": "rows", "reduction": "none"}, 3, False),
    "lse": ({"return_lse": True}, 3, False),
    "z-loss, softcap": ({"z_loss": 0.01, "softcap": 3.0}, 3, True),
    "float32": ({"out_dtype": torch.float32}, 3, True),
    "float64": ({"out_dtype": torch.float64}, 3, True),
    "smoothing": ({"label_smoothing": 0.2}, 4, True),
    "smoothing, all": (
        {
            "weight": "classes", "sample_weight": "rows", "label_smoothing": 0.2, "z_loss": 0.01, "softcap": 3.0,
            "return_lse": True, "reduction": "none",
        }, 4, False,
    ),
    "smoothing, weights": ({"weight": "classes", "label_smoothing": 0.2, "z_loss": 0.01}, 4, True),
    "scale, normalizer": ({"logit_scale": 0.7, "normalizer": 17.0}, 3, True),
    "scale, in backward": ({"logit_scale": 0.7, "normalizer": 17.0, "grad_in_forward": False}, 3, False),
    "shift": ({"shift": 1}, 3, True),
    "shift, none": ({"shift": 2, "reduction": "none"}, 3, False),
    "zero": ({"all_ignored": "zero"}, 3, True),
}  # fmt: skip


class Data(NamedTuple):
    operands: list[Tensor]  # hidden states, head, bias
    target: Tensor
    classes: Tensor
    rows: Tensor


def data(
    dtype: torch.dtype, leading: tuple[int, ...] = (21,), positions: tuple[int, ...] = (), seed: int = 0,
    classes: int = CLASSES, features: int = FEATURES,
) -> Data:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    operands = [random(*leading, features), random(classes, *positions, features), random(classes, *positions)]
    target = torch.randint(classes, leading + positions, generator=generator)
    target.view(-1)[2::5] = IGNORED
    weights = 0.5 + random(classes).abs()
    rows = random(*target.shape).abs()
    rows.view(-1)[3::7] = 0
    return Data([each.to(dtype) for each in operands], target, weights.to(dtype), rows.to(dtype))


def options_of(name: str, d: Data) -> dict[str, Any]:
    given = {"classes": d.classes, "rows": d.rows}
    return {key: given[value] if value in list(given) else value for key, value in CALLS[name][0].items()}


def mine(d: Data, ends: list[int], bias: bool) -> list[Tensor | None]:
    rank = dist.get_rank()
    part = slice(ends[rank], ends[rank + 1])
    input, weight, of_bias = d.operands
    return [each.clone().requires_grad_() for each in (input, weight[part])] + [
        of_bias[part].clone().requires_grad_() if bias else None
    ]


def wide(d: Data) -> Data:
    return Data([each.double().clone() for each in d.operands], d.target, d.classes.double(), d.rows.double())


def whole_results(name: str, d: Data, bias: bool) -> tuple[list[Tensor], list[Tensor]]:
    """In one process and float64."""
    d = wide(d)
    operands = [each.requires_grad_() for each in d.operands[: 2 + bias]]
    options = {key: value for key, value in options_of(name, d).items() if key != "out_dtype"}
    bias_of = operands[2] if bias else None
    # In chunks, which leave out a row that is no number.
    results = whole.linear_cross_entropy(*operands[:2], d.target, linear_bias=bias_of, chunk_rows=64, **options)
    return [each.detach() for each in outputs(results)], list(torch.autograd.grad(weighed(results), operands))


def sharded(name: str, d: Data, operands: list[Any], ends: list[int], cut: str = "", **more: Any) -> Any:
    options = {**options_of(name, d), **sharding(ends, cut), **more}
    return parallel.linear_cross_entropy(*operands[:2], d.target, linear_bias=operands[2], **options)


def compare(
    name: str, d: Data, ends: list[int], cut: str = "", bias: bool = True, slack: float = 1, **more: Any
) -> None:
    dtype = d.operands[0].dtype
    label = f"{name}, {dtype}, {cut}, {more}"
    exact, of_operands = whole_results(name, d, bias)
    operands = mine(d, ends, bias)
    got = sharded(name, d, operands, ends, cut, **more)
    weighed(got).backward()
    results = [each.detach() for each in outputs(got)]
    same_bits(label, [*results, operands[0].grad])
    rank = dist.get_rank()
    part = slice(ends[rank], ends[rank + 1])
    for place, (found, wanted) in enumerate(zip(results, exact, strict=True)):
        within(f"{label}, result {place + 1}", found, wanted, wanted, slack * max(LIMITS[dtype], LIMITS[found.dtype]))
    for place, (operand, wanted) in enumerate(zip(operands, of_operands, strict=False)):
        assert operand is not None and operand.grad is not None
        part_of = wanted if place == 0 else wanted[part]
        limit = slack * max(LIMITS[dtype], LIMITS[options_of(name, d).get("out_dtype") or dtype])
        within(f"{label}, gradient {place + 1}", operand.grad, part_of, wanted, limit)


# ---- checks


def values(dtypes: tuple[torch.dtype, ...] = tuple(LIMITS)) -> None:
    """Every call against one process, over even, uneven and empty shards, in chunks of several sizes."""
    for dtype in dtypes:
        for number, name in enumerate(CALLS):
            for cut, ends in cuts(CLASSES).items():
                d = data(dtype, seed=number)
                for chunk_rows in (None, 6):
                    compare(name, d, ends, cut, bias=number % 3 > 0, chunk_rows=chunk_rows)


def few_values() -> None:
    """Forward with and without the gradients, over uneven shards."""
    for name, dtype in product(("smoothing, weights", "lse", "shift, none"), (torch.float64, torch.bfloat16)):
        compare(name, data(dtype), cuts(CLASSES)["uneven"], chunk_rows=6)


def shapes() -> None:
    """Inputs of several dimensions or of one, heads of several, rows that all count, and one class a rank."""
    ends = cuts(CLASSES)["uneven"]
    for name in CALLS:
        compare(name, data(torch.float64, (3, 7)), ends, chunk_rows=4)
        if "shift" not in name:
            compare(name, data(torch.float64, (2, 5), (3,)), ends, chunk_rows=4)
            compare(name, data(torch.float64, ()), ends)
        d = data(torch.float64)
        compare(name, d._replace(target=d.target.clamp_min(0)), ends, chunk_rows=8)
        ranks = dist.get_world_size()
        compare(name, data(torch.float64, classes=ranks), list(range(ranks + 1)), chunk_rows=8)


def edges() -> None:
    """All rows ignored, none there, several indices or a mask to ignore, and a hidden state that is no number."""
    ends = cuts(CLASSES)["uneven"]
    for name, in_forward in product(CALLS, (None, False)):
        more = {} if "grad_in_forward" in CALLS[name][0] else {"grad_in_forward": in_forward}
        d = data(torch.float64)
        d.operands[0][2] = torch.nan
        if CALLS[name][0].get("return_lse"):
            continue  # which is that of every row
        compare(name, d, ends, chunk_rows=6, **more)
        compare(name, d._replace(target=torch.full_like(d.target, IGNORED)), ends, chunk_rows=6, **more)
    d = data(torch.float64, (0,))
    operands = mine(d, ends, True)
    loss = sharded("mean", d, operands, ends)
    loss.backward()
    expect(bool(loss.isnan()) and not operands[1].grad.any(), f"expected NaN of no rows, got {loss}")
    d = data(torch.float64)
    d = d._replace(target=d.target.clamp_min(0))
    for ignore in (d.target > 6, [3, 5], 4):
        exact = whole.linear_cross_entropy(*d.operands[:2], d.target, ignore_index=ignore)
        got = parallel.linear_cross_entropy(
            d.operands[0], mine(d, ends, False)[1], d.target, ignore_index=ignore, **sharding(ends)
        )
        expect(abs(float(got.detach() - exact)) < 1e-12, f"ignore_index {ignore}: expected {exact}, got {got}")


def whole_gradients(d: Data) -> tuple[Tensor, ...]:
    operands = [each.requires_grad_() for each in wide(d).operands[:2]]
    return torch.autograd.grad(whole.linear_cross_entropy(*operands, d.target), operands)


def scaled_means() -> None:
    """In float16 beside the upstream gradient of a GradScaler, where gradients of the mean would underflow without."""
    ends = cuts(300)["even"]
    d = data(torch.float16, (2048,), classes=300, features=8)
    operands = mine(d, ends, False)
    (65536 * sharded("float32", d, operands, ends, chunk_rows=600)).backward()
    exact = [65536 * each for each in whole_gradients(d)]
    rank = dist.get_rank()
    for got, wanted in zip(operands, (exact[0], exact[1][ends[rank] : ends[rank + 1]]), strict=False):
        within("float16, scaled", got.grad, wanted, wanted, 2**-8)


def collectives() -> None:
    """Forward with gradients: ten numbers, then for each chunk the rows' numbers and a sum of their gradient. Forward
    without: the numbers of all rows, and backward the sums. Without reduce_input_grad, or for an input that requires
    no gradient, no sum."""
    ends = cuts(CLASSES)["even"]
    gather, total = "_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.all_reduce_.default"
    for name, (_, numbers, in_forward) in CALLS.items():
        for dtype, reduces, asks in product((torch.float64, torch.float32), (True, False), (True, False)):
            d = data(dtype)
            if CALLS[name][0].get("out_dtype") == torch.float64 and dtype != torch.float64:
                continue
            operands = mine(d, ends, True)
            operands[0].requires_grad_(asks)
            counted = d.target != IGNORED
            if "shift" in CALLS[name][0]:
                continue  # whose rows that count are others
            if "sample_weight" in CALLS[name][0]:
                counted = counted & (d.rows != 0)
            kept = 21 if CALLS[name][0].get("return_lse") else int(counted.sum())
            chunks = -(-kept // 6)
            step = -(-kept // chunks)
            sizes = [min(step, kept - start) for start in range(0, kept, step)]
            with Collectives() as forward:
                results = weighed(sharded(name, d, operands, ends, chunk_rows=6, reduce_input_grad=reduces))
            with Collectives() as backward:
                results.backward()
            of_rows = lambda rows: (gather, dtype.itemsize * (rows * numbers + 10))  # noqa: B023, E731
            sums = [(total, dtype.itemsize * rows * FEATURES) if reduces and asks else None for rows in sizes]
            if in_forward:
                pairs = [each for rows, sum in zip(sizes, sums, strict=True) for each in (of_rows(rows), sum)]
                expected = [(gather, dtype.itemsize * 10), *pairs], []
            else:
                expected = [of_rows(21)], sums
            expected = tuple([each for each in part if each is not None] for part in expected)
            expect((forward.sent, backward.sent) == expected, f"{name}: {forward.sent}, {backward.sent}, {expected}")


def parts_of_the_input() -> None:
    """Without reduce_input_grad, what the ranks have of the input's gradient sums to it."""
    ends = cuts(CLASSES)["uneven"]
    for name in CALLS:
        d = data(torch.float64)
        operands = mine(d, ends, True)
        weighed(sharded(name, d, operands, ends, chunk_rows=6, reduce_input_grad=False)).backward()
        part = operands[0].grad
        dist.all_reduce(part)
        exact = whole_results(name, d, True)[1][0]
        within(f"{name}, parts", part, exact, exact, 1e-12)


def frozen() -> None:
    """An input, a head or a bias that requires no gradient gets none, and the others theirs."""
    ends = cuts(CLASSES)["uneven"]
    rank = dist.get_rank()
    for name, frozen in product(("mean", "none"), product((False, True), repeat=3)):
        d = data(torch.float64)
        operands = mine(d, ends, True)
        for each, stays in zip(operands, frozen, strict=True):
            each.requires_grad_(not stays)
        results = sharded(name, d, operands, ends, chunk_rows=6)
        expect(results.requires_grad == (not all(frozen)), f"{name}, {frozen}: {results.requires_grad}")
        if all(frozen):
            continue
        weighed(results).backward()
        for place, exact in enumerate(whole_results(name, d, True)[1]):
            got = operands[place].grad
            expect((got is None) == frozen[place], f"{name}, {frozen}: gradient {place}")
            if got is not None:
                within(
                    f"{name}, {frozen}", got, exact if place == 0 else exact[ends[rank] : ends[rank + 1]], exact, 1e-12
                )


def in_blocks() -> None:
    rule = _exchange.in_blocks
    _exchange.in_blocks = lambda *_: True
    try:
        values((torch.float64,))
    finally:
        _exchange.in_blocks = rule


def derivatives() -> None:
    """Second derivatives, several backwards, torch.func and forward mode."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([each]) for each in range(ranks)][rank]
    ends = cuts(CLASSES)["uneven"]
    part = slice(ends[rank], ends[rank + 1])
    for name in CALLS:
        if "out_dtype" in CALLS[name][0]:
            continue
        d = data(torch.float64, (6,), classes=5)
        options = options_of(name, d)

        def run(*operands: Tensor, d: Data = d, options: Any = options) -> Any:
            return parallel.linear_cross_entropy(
                *operands[:2], d.target, linear_bias=operands[2], group=alone, chunk_rows=4, **options
            )

        leaves = [each.clone().requires_grad_() for each in d.operands]
        torch.autograd.gradcheck(run, leaves, check_forward_ad=True)
        torch.autograd.gradgradcheck(run, leaves)
        of_func = torch.func.grad(lambda *each, run=run: weighed(run(*each)), (0, 1, 2))(*d.operands)
        for got, exact in zip(of_func, torch.autograd.grad(weighed(run(*leaves)), leaves), strict=True):
            within(f"{name}, torch.func.grad", got, exact, exact, 1e-12)

        d = data(torch.float64)
        found = []
        for sharded_ in (False, True):
            operands = mine(d, ends, True) if sharded_ else [each.clone().requires_grad_() for each in d.operands]
            if sharded_:
                value = weighed(sharded(name, d, operands, ends, chunk_rows=6))
            else:
                value = weighed(whole.linear_cross_entropy(
                    *operands[:2], d.target, linear_bias=operands[2], **options_of(name, d)
                ))  # fmt: skip
            first = torch.autograd.grad(value, operands, create_graph=True)
            # What every rank has whole is used once: the head's part of the sum is that of the rank.
            mixed = torch.autograd.grad(first[0].square().sum(), operands, retain_graph=True)
            again = torch.autograd.grad(value, operands, retain_graph=True)
            last = torch.autograd.grad(value, operands)
            for one, two, three in zip(first, again, last, strict=True):
                expect(error(one, three.detach(), three.detach()) < 1e-12, f"{name}: create_graph changed a gradient")
                expect(error(two, three.detach(), three.detach()) < 1e-12, f"{name}: a second backward differs")
            found.append(mixed)
        for place, (exact, got) in enumerate(zip(*found, strict=True)):
            within(f"{name}, twice", got, exact if place == 0 else exact[part], exact, 1e-11)


def derivatives_of_factors() -> None:
    """What every rank has whole may require a gradient, which is whole on every rank."""
    ends = cuts(CLASSES)["uneven"]
    d = data(torch.float64)
    found = []
    for one in (True, False):
        rows, z_loss, divisor = (
            each.clone().requires_grad_() for each in (d.rows, torch.tensor(0.1), torch.tensor(9.0))
        )
        options = {"sample_weight": rows, "z_loss": z_loss, "normalizer": divisor}
        if one:
            loss = whole.linear_cross_entropy(*d.operands[:2], d.target, **options)
        else:
            loss = sharded("mean", d, mine(d, ends, False), ends, chunk_rows=6, **options)
        found.append(torch.autograd.grad(loss, (rows, z_loss, divisor)))
    for exact, got in zip(*found, strict=True):
        within("a factor", got, exact.double(), exact.double(), 1e-6)


def compiled() -> None:
    """Whole, through the logits of the rank."""
    ends = cuts(CLASSES)["uneven"]
    for name in ("mean", "smoothing, all", "scale, normalizer"):
        d = data(torch.float64)
        torch._dynamo.reset()
        run = torch.compile(
            lambda *operands, name=name, d=d: sharded(name, d, operands, ends), fullgraph=True, backend="aot_eager"
        )
        operands, others = mine(d, ends, True), mine(d, ends, True)
        got, exact = run(*operands), sharded(name, d, others, ends)
        weighed(got).backward()
        weighed(exact).backward()
        torch.testing.assert_close(got, exact)
        for one, two in zip(operands, others, strict=True):
            torch.testing.assert_close(one.grad, two.grad, msg=lambda text, name=name: f"{name}, compiled: {text}")


def memory() -> None:
    """A step takes one chunk of logits beside the gradients, and some numbers a row."""
    ranks, rows, features, classes, chunk_rows = dist.get_world_size(), 512, 64, 32_768, 64
    ends = cuts(classes)["even"]
    for dtype, name in product((torch.float32, torch.bfloat16), ("mean", "none", "smoothing, weights")):
        d = data(dtype, (rows,), classes=classes, features=features)
        d = d._replace(target=d.target.clamp_min(0))

        operands = mine(d, ends, False)

        def step(d: Data = d, name: str = name, operands: list[Any] = operands) -> None:
            weighed(sharded(name, d, operands, ends, chunk_rows=chunk_rows)).backward()

        step()
        operands[0].grad = operands[1].grad = None
        peak = peak_bytes(step) - sum(each.nbytes for each in operands[:2])
        chunk = chunk_rows * (ends[1] - ends[0]) * dtype.itemsize
        # In half precision the sum of the head's gradient in float32, a product that is added, and what torch copies.
        in_float = 2 * features * (ends[1] - ends[0]) * 4 if dtype == torch.bfloat16 else 0
        expect(peak < 1.1 * chunk + in_float + 2**20, f"{name}, {dtype}, {ranks} ranks: {peak}, chunk {chunk}")


def situations() -> None:
    """Under autocast, another group, a mesh; what explain says."""
    ends = cuts(CLASSES)["uneven"]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    d = data(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        exact = whole.linear_cross_entropy(*d.operands[:2], d.target)
        operands = mine(d, ends, False)
        got = sharded("mean", d, operands, ends)
    expect(got.dtype == exact.dtype, f"autocast: expected {exact.dtype}, got {got.dtype}")
    within("autocast", got, exact.double(), exact.double(), 1e-5)
    got.backward()
    expect(operands[0].grad.dtype == torch.float32, "autocast: expected a gradient in float32")
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks,))
    d = data(torch.float64)
    exact = whole.linear_cross_entropy(*d.operands[:2], d.target)
    within("a mesh", sharded("mean", d, mine(d, ends, False), ends, group=mesh), exact, exact, 1e-12)
    operands = mine(d, ends, False)
    path = fusedloss.explain(parallel.linear_cross_entropy, *operands[:2], d.target, chunk_rows=6, **sharding(ends))
    uneven = cuts(60_000)["uneven"]
    large = torch.zeros(4096, 1), torch.zeros(uneven[rank + 1] - uneven[rank], 1)
    told: list[Any] = [None] * ranks
    chunks = fusedloss.explain(parallel.linear_cross_entropy, *large, torch.zeros(4096).long(), **sharding(uneven))
    dist.all_gather_object(told, chunks.split(", ")[2:])
    expect(
        told == [told[0]] * ranks and "chunks of" in told[0][0], f"expected the same chunks on every rank, got {told}"
    )
    words = [f"classes {ends[rank]} to {ends[rank + 1]} of 13", "4 chunks of 6 rows", "4 exchanges of 144 bytes"]
    expect(path.startswith("fused: cpu") and all(each in path for each in words), path)


def placements() -> None:
    """A head that is a DTensor, in functional's loss: right where its classes are cut, refused elsewhere."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = dist.get_world_size()
    meshes = [(init_device_mesh("cpu", (ranks,)), [Shard(0)])]
    if ranks % 2 == 0:
        mesh = init_device_mesh("cpu", (2, ranks // 2))
        meshes += [(mesh, [Shard(0), Replicate()]), (mesh, [Replicate(), Shard(0)])]
    for (mesh, place), name in product(meshes, CALLS):
        everywhere = [Replicate()] * mesh.ndim
        d = data(torch.float64)
        exact, gradients = whole_results(name, d, True)
        operands = [
            distribute_tensor(each.clone(), mesh, everywhere if i == 0 else place).requires_grad_()
            for i, each in enumerate(d.operands)
        ]
        others = [distribute_tensor(each, mesh, everywhere) for each in d[1:]]
        options = options_of(name, d._replace(classes=others[1], rows=others[2]))
        got = whole.linear_cross_entropy(*operands[:2], others[0], linear_bias=operands[2], chunk_rows=6, **options)
        for found, wanted in zip(outputs(got), exact, strict=True):
            limit = LIMITS[found.dtype]
            within(f"{name}, {place}", found.full_tensor().detach(), wanted, wanted, limit)
            expect(found.placements == tuple(everywhere), f"{name}, {place}: {found.placements}")
        made = torch.autograd.grad(weighed(tuple(each.full_tensor() for each in outputs(got))), operands)
        for found, operand, wanted in zip(made, operands, gradients, strict=True):
            within(f"{name}, {place}, gradient", found.full_tensor(), wanted, wanted, limit)
            expect(found.placements == operand.placements, f"{name}, {place}: {found.placements}")
    mesh, d = meshes[0][0], data(torch.float64)
    x, t = (distribute_tensor(each, mesh, [Replicate()]) for each in (d.operands[0], d.target))
    head, across = (distribute_tensor(d.operands[1], mesh, [Shard(dim)]) for dim in (0, 1))
    run = whole.linear_cross_entropy
    for words, call in (
        ("linear_weight to be sharded over its classes", lambda: run(x, across, t)),
        ("pass linear_weight.full_tensor()", lambda: run(x, distribute_tensor(d.operands[1], mesh, [Replicate()]), t)),
        ("expected input to be a DTensor of placements", lambda: run(d.operands[0], head, t)),
        ("expected target to be a DTensor of placements", lambda: run(x, head, d.target)),
        ("expected input to be a DTensor of placements", lambda: run(x.redistribute(mesh, [Shard(0)]), head, t)),
        ("for return_accuracy", lambda: run(x, head, t, return_accuracy=True)),
        ("expected input to be whole on every rank", lambda: run(x, d.operands[1], t)),
    ):
        raises(RuntimeError, words, call)


def errors() -> None:
    """The same on every rank, and the next call is right."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ends = cuts(CLASSES)["even"]
    d = data(torch.float32)
    input, head, bias = mine(d, ends, True)
    last = rank == ranks - 1

    def run(input: Any = input, head: Any = head, target: Any = d.target, **options: Any) -> Any:
        return parallel.linear_cross_entropy(input, head, target, **{"vocab_size": CLASSES, **options})

    follow = "expected the ranks' classes to follow each other from 0 to the same vocab_size"
    for way in ({}, {"grad_in_forward": False}):
        cases: list[Any] = [
            (ValueError, follow, {"vocab_start": ends[rank] - (rank > 0)}),
            (ValueError, "the same target", {"target": d.target.roll(1) if last else d.target}),
            (ValueError, "the same target", {"ignore_index": 0 if last else -100}),
            (ValueError, "the same target", {"weight": torch.ones(CLASSES + last)}),
            (IndexError, "Target 13 is out of bounds.", {"target": torch.full_like(d.target, 13)}),
            (RuntimeError, "should be defined either for all", {"weight": torch.ones(CLASSES + 1)}),
        ]
        for kind, words, options in cases:
            raises(kind, words, lambda options=options, way=way: run(**options, **way))
    cases = [
        (ValueError, "chunk_rows and ways to make gradients", lambda: run(chunk_rows=3 + last)),
        (ValueError, "Expected input batch_size (21) to match", lambda: run(target=d.target[:20])),
        (RuntimeError, "last dimensions (in_features), got 4 and 5", lambda: run(input[:, :4])),
        (RuntimeError, "expected linear_bias shape", lambda: run(linear_bias=bias[:0] if len(bias) else bias[None])),
        (TypeError, "expected class indices", lambda: run(target=d.operands[0])),
        (TypeError, "argument 'target' must be Tensor, not list", lambda: run(target=[0, 1])),
        (TypeError, "argument 'logit_scale' must be float", lambda: run(logit_scale=torch.tensor(2.0))),
        (ValueError, "chunk_rows must be at least 1", lambda: run(chunk_rows=0)),
        (ValueError, "normalizer needs reduction='mean'", lambda: run(normalizer=3.0, reduction="sum")),
        (ValueError, "is not a valid value for reduction", lambda: run(reduction="all")),
        (ValueError, "shift must be below", lambda: run(shift=21)),
        (RuntimeError, "label_smoothing must be between", lambda: run(label_smoothing=1.5)),
    ]  # fmt: skip
    for kind, words, call in cases:
        raises(kind, words, call)
    exact = whole.linear_cross_entropy(*d.operands[:2], d.target)
    within("after errors", run(), exact.double(), exact.double(), 1e-6)


if __name__ == "__main__":
    sys.exit(main(globals(), *sys.argv[1:]))
