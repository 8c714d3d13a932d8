"""Counts what a kernel takes for an element of a real shape, from its first instruction to its last.

To the passes of the hot loops comes the rest: the cheapest way through the kernel, or around its loop of rows, that
passes by the landmarks of what a row needs (its target, the shuffles that merge its threads, the block that works its
result out) and by nothing that the shape does without. All logits are of 2 bytes, rows are aligned and many, and every
target counts. How plan.h and the drivers deal rows out to threads stands here in a few lines.
"""

from collections.abc import Callable
from math import ceil

from instructions import Step, arguments, steps
from sass import Block, Kernel, Part

WARP, THREADS = 32, 256
VECTOR, UNROLL = 8, 4  # logits of a vector, vectors of a thread in flight
HOT = 1000  # what a hot loop is worth beside a landmark

Blocks = frozenset[int]
NONE: Blocks = frozenset()


class Way:
    """A kernel or, by rows, its loop that takes one row after another."""

    def __init__(self, name: str, kernel: Kernel, by_rows: bool):
        self.kernel, self.steps = kernel, steps(name)
        self.hot = [loop for step in self.steps if (loop := step.loop(kernel))]
        assert len(self.hot) == len(self.steps), f"expected all hot loops of {name}"
        around = [loop for loop in kernel.loops if all(hot.body < loop.body for hot in self.hot)]
        self.part: Part = min(around, key=lambda loop: len(loop.body)) if by_rows else kernel.whole
        self.in_hot = frozenset(n for loop in self.hot for n in loop.body)
        # Loops for scalars, for gradients of zero and for sums over a grid.
        self.seldom = frozenset(n for loop in kernel.innermost for n in loop.body) - self.in_hot

    def where(self, wanted: Callable[[Block], bool]) -> Blocks:
        return frozenset(n for n in self.part.body - self.in_hot if wanted(self.kernel.blocks[n]))

    def having(self, name: str, width: int | None = None, least: int = 1) -> Blocks:
        return self.where(lambda block: block.count(lambda i: i.name == name and width in (None, i.width)) >= least)

    def working_out(self) -> Blocks:
        """Where a row's loss or gradient is made: an exponential beside a logarithm or a reciprocal."""

        def makes(block: Block) -> bool:
            opcodes = {i.opcode for i in block.instructions}
            return "MUFU.EX2" in opcodes and not opcodes.isdisjoint({"MUFU.LG2", "MUFU.RCP"})

        return self.where(makes)

    def rest(self, landmarks: Blocks, avoided: Blocks = NONE) -> int:
        """Instructions outside the hot loops, on the cheapest way through those and by the most landmarks."""
        heads = {loop.head for loop in self.hot}

        def worth(n: int) -> int:
            return HOT if n in heads else int(n in landmarks)

        ways = self.part.ways(worth, avoided | self.seldom, self.in_hot)
        most = max(ways, default=0)
        assert most >= HOT * len(heads), "expected a way through all hot loops"
        return ways[most]

    def passes(self, elements: float) -> float:
        """Instructions of a thread that takes so many elements through every hot loop."""
        return sum(passes(step, loop, elements) for step, loop in zip(self.steps, self.hot, strict=True))


def passes(step: Step, loop: Part, elements: float) -> float:
    of_pass, instructions = step.of_pass(loop)
    whole, left = divmod(elements, of_pass)
    return whole * instructions + (step.of_part(loop, left) if left else 0)


def lanes_of(classes: int) -> int:
    """The threads of a row, as in plan_row."""
    loads = classes // VECTOR
    if loads <= 16 * WARP:
        return WARP
    return min(THREADS, 1 << (ceil(loads / (2 * UNROLL)) - 1).bit_length())


def forward_rows(name: str, kernel: Kernel, classes: int) -> float:
    way, lanes = Way(name, kernel, by_rows=True), lanes_of(classes)
    in_loops = way.passes(ceil(classes / VECTOR / lanes) * VECTOR)
    stores, barriers, shared = way.having("STG"), way.having("BAR"), way.having("STS")
    shuffles, bad_target = way.having("SHFL", least=5), way.having("STG", VECTOR * 2)
    needed = way.having("LDG", 8) | way.having("LDG", 2) | shuffles | shared | way.working_out()
    # Clusters are for longer rows. What stores is where a warp finishes 32 rows at once.
    avoided = way.having("MEMBAR") | way.having("UCGABAR_WAIT") | (barriers - shared)
    if lanes == WARP:
        row = way.rest(needed, avoided | barriers | stores)
        finish = way.rest(needed | stores, avoided | barriers | bad_target) - row
        return in_loops * lanes / classes + (row * lanes + finish) / classes
    # The first warp merges what all have left, and works the gradient out.
    merging = frozenset(n for n in shuffles if n > min(barriers & shared))
    first = way.rest(needed, avoided | stores)
    other = way.rest(needed, avoided | stores | merging | way.working_out())
    finish = way.rest(needed | stores, avoided | bad_target) - first
    return in_loops * lanes / classes + (first * WARP + other * (lanes - WARP) + finish) / classes


def backward_rows(name: str, kernel: Kernel, classes: int) -> float:
    lanes, rows_of_group = lanes_of(classes), 16
    before_loop = UNROLL * VECTOR  # logits of a thread
    whole, row = Way(name, kernel, by_rows=False), Way(name, kernel, by_rows=True)
    set_up = whole.working_out() | whole.having("LDG", 8) | whole.having("LDG", 2) | whole.having("STS")
    reads, writes = whole.having("LDG", VECTOR * 2), row.having("STG", VECTOR * 2)
    if lanes == WARP:
        # A group takes 16 rows one after another; its first lanes set up one each.
        in_loops = row.passes(max(0, ceil(classes / VECTOR / lanes) * VECTOR - before_loop))
        of_row = row.rest((reads & row.part.body) | writes)
        of_group = whole.rest(set_up | reads - row.part.body) - row.rest(NONE)
        return lanes * (in_loops + of_row + of_group / rows_of_group) / classes
    # A block takes 8 vectors a thread of one row, which its first warp sets up.
    of_thread = 2 * before_loop
    blocks = ceil(classes / of_thread / lanes)
    needed, avoided = (reads - row.part.body) | writes, reads & row.part.body
    first = whole.rest(needed | set_up, avoided)
    other = whole.rest(needed, avoided | whole.working_out())
    in_loops = row.passes(of_thread - before_loop)
    return blocks * (lanes * in_loops + WARP * first + (lanes - WARP) * other) / classes


def tiles(name: str, kernel: Kernel, classes: int) -> float:
    way = Way(name, kernel, by_rows=True)
    lanes = 1
    while 64 * lanes < classes:  # as in plan_tiles
        lanes *= 2
    rows = THREADS // lanes
    vectors = ceil(rows * classes / VECTOR / THREADS)  # of a thread
    columns = ceil(ceil(classes / lanes) / 4) * 4  # of a thread, four at a time
    in_loops = 0.0
    for step, loop in zip(way.steps, way.hot, strict=True):
        of_pass, instructions = step.of_pass(loop)
        if step.piece == "LDG":
            in_loops += ceil(vectors * VECTOR / of_pass) * instructions
        else:  # unrolled by ptxas, which puts what is left over beside the loop
            in_loops += (columns if step.elements == 1 else vectors * VECTOR) / of_pass * instructions
    left_over = way.having("LDS", 2, least=2)
    avoided = left_over | way.having("SHFL", least=5) | (way.having("SHFL") if lanes == 1 else NONE)
    avoided |= way.having("STG", 16) - way.having("LDS", 16)  # a bad target
    every = way.having("BAR") | way.having("STS", 16) | way.having("SHFL")
    statistics = way.having("STG", 4) - way.having("STG", 2)  # other blocks store a result that a mean leaves out
    owner = way.working_out() | way.having("LDG", 8) | statistics
    of_row = way.rest(every | owner | way.having("STS", 4), avoided)
    of_others = way.rest(every, avoided | owner)
    return (THREADS * in_loops + rows * of_row + (THREADS - rows) * of_others) / (rows * classes)


def columns(name: str, kernel: Kernel, classes: int) -> float:
    way = Way(name, kernel, by_rows=name.startswith("forward"))
    rows = way.steps[0].width // 2
    targets = way.having("LDG", 8)
    needed = way.working_out() | targets | (way.having("STG", 16) - targets)
    merging = way.having("BAR") & way.having("STS")  # of several threads of a row, where rows are few
    return (way.passes(classes * rows) + way.rest(needed, merging)) / (classes * rows)


def pointwise(name: str, kernel: Kernel, _: int) -> float:
    """Its loop: elements are so many that nothing else counts."""
    (step,) = steps(name)
    loop = step.loop(kernel)
    assert loop
    elements, instructions = step.of_pass(loop)
    return instructions / elements


FAMILIES = {
    "forward_rows": forward_rows,
    "backward_rows": backward_rows,
    "tiles": tiles,
    "forward_columns": columns,
    "backward_columns": columns,
    "pointwise_dense": pointwise,
}
ARCHITECTURE = "sm_90"
# Of a kernel, by its number of classes, the instructions an element that it should take at most.
_CROSS_ENTROPY = "CrossEntropyWith<float, Unchanged<float>, false>"
_SUM_AND_GRAD = "pointwise_dense<SumAndGrad, bf16, "
TARGETS: dict[str, dict[int, int]] = {
    f"forward_rows<bf16, bf16, {_CROSS_ENTROPY}, false>": {1024: 16, 4096: 16, 32000: 10, 128256: 10},
    f"backward_rows<bf16, bf16, {_CROSS_ENTROPY}>": {1024: 20, 4096: 20, 32000: 14, 128256: 14},
    f"forward_rows<bf16, bf16, {_CROSS_ENTROPY}, true>": {1024: 24, 4096: 24, 32000: 24},
    f"tiles<bf16, {_CROSS_ENTROPY}, true, false>": {10: 40, 32: 40, 100: 40},
    f"tiles<bf16, {_CROSS_ENTROPY}, false, true>": {10: 40, 32: 40, 100: 40},
    f"forward_columns<bf16, bf16, {_CROSS_ENTROPY}, 8>": {21: 20},
    f"backward_columns<bf16, bf16, {_CROSS_ENTROPY}, 4>": {21: 18},
    f"{_SUM_AND_GRAD}Mse<float>>": {0: 20},
    f"{_SUM_AND_GRAD}L1<float>>": {0: 20},
    f"{_SUM_AND_GRAD}SmoothL1<float>>": {0: 20},
    f"{_SUM_AND_GRAD}Huber<float>>": {0: 20},
    f"{_SUM_AND_GRAD}BinaryCrossEntropyWithLogits<float>>": {0: 45},
    f"{_SUM_AND_GRAD}SigmoidFocalWith<float, GammaTwo<float>>>": {0: 60},
    f"{_SUM_AND_GRAD}BinaryCrossEntropyWith<float, LogarithmsForHalves>>": {0: 60},
}


def counts(name: str, kernel: Kernel) -> dict[int, float]:
    """The instructions an element at every number of classes for which the kernel has a target."""
    family = FAMILIES.get(arguments(name)[0])
    return {classes: round(family(name, kernel, classes), 2) for classes in TARGETS.get(name, {})} if family else {}
