"""Counts the instructions that a thread of a CUDA kernel takes for an element, from the machine code.

The count of a kernel is that of its hot loops, through which every element goes: the instructions of a pass over its
elements. A pass is told by the pieces that it moves, loads or stores of as many bytes as the kernel's types make a
piece. Of the ways around a loop that move the most pieces, and of those that then call the most special functions (do
the most arithmetic where there are none), it is the shortest: what nearly no pass does, such as to look for the
target's place in a vector, is left out, and so are weights where a branch goes around them. What an element costs
beside the loops is counted by whole_kernel.py, at some shapes.

Two counts are of a row in place of an element: those of a loss that reads only the target's logit, and of the divisor.
"""

from dataclasses import dataclass

from sass import Instruction, Kernel, Part

SIZES = {"bf16": 2, "fp16": 2, "float": 4, "double": 8}
VECTOR = 16  # bytes
PIECE = 1 << 20  # what a piece is worth beside an instruction that computes: more than all of them
PRODUCTS = {"FMUL", "FFMA", "FMUL2", "FFMA2", "DMUL", "DFMA"}
ARITHMETIC = {*PRODUCTS, "FADD", "FADD2", "DADD"}


@dataclass(frozen=True)
class Step:
    """A hot loop, known by its pieces."""

    piece: str  # LDG, STG: global memory; LDS, STS: shared memory
    width: int  # of a piece, in bytes
    elements: float = 1  # of a piece
    beside: str = ""  # what the loop must have too,
    without: str = ""  # and what it must not have
    whole: bool = False  # no loop: the kernel

    def _is_piece(self, instruction: Instruction) -> bool:
        return instruction.name == self.piece and instruction.width == self.width

    def loop(self, kernel: Kernel) -> Part | None:
        """Of several one with products, and the most pieces and instructions: others sum a grid, or take the rest."""
        if self.whole:
            return kernel.whole

        def names(loop: Part) -> set[str]:
            return {i.name for n in loop.body for i in kernel.blocks[n].instructions}

        def fits(loop: Part) -> bool:
            return (
                loop.count(self._is_piece) > 0 and self.without not in names(loop) and self.beside in names(loop) | {""}
            )

        found = [loop for loop in kernel.innermost if fits(loop)]
        return max(found, key=lambda loop: (not PRODUCTS.isdisjoint(names(loop)), self.of_pass(loop)), default=None)

    def _ways(self, loop: Part) -> dict[tuple[int, int], int]:
        """The fewest instructions for a number of pieces and one of instructions that compute."""

        computes = {"MUFU"} if loop.count(lambda i: i.name == "MUFU") else ARITHMETIC

        def worth(n: int) -> int:
            block = loop.kernel.blocks[n]
            return PIECE * block.count(self._is_piece) + block.count(lambda i: i.name in computes)

        return {divmod(sum_of, PIECE): spent for sum_of, spent in loop.ways(worth).items()}

    def of_pass(self, loop: Part) -> tuple[float, int]:
        """The elements and the instructions of a pass."""
        ways = self._ways(loop)
        most = max(ways)
        return most[0] * self.elements, ways[most]

    def of_part(self, loop: Part, elements: float) -> int:
        """The instructions of a pass that has fewer elements."""
        ways = self._ways(loop)
        pieces = min(pieces for pieces, _ in ways if pieces * self.elements >= elements)
        return ways[max(way for way in ways if way[0] == pieces)]


def arguments(name: str) -> tuple[str, list[str]]:
    """`f<A<B, C>, D>` as f and [A<B, C>, D]."""
    family, _, rest = name.partition("<")
    found, depth = [""], 0
    for character in rest.removesuffix(">"):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return family, [argument.strip() for argument in found]


def steps(name: str) -> list[Step]:
    """The hot loops of a kernel."""
    family, of = arguments(name)
    size = [SIZES.get(argument, 0) for argument in of]
    if family == "forward_rows":
        read = size[0] + (size[1] if "Soft" in of[2] else 0)
        if of[3] == "false":
            return [Step("LDG", VECTOR, VECTOR / read)]
        return [Step("LDG", VECTOR, VECTOR / read, without="STG"), Step("STG", VECTOR, VECTOR / size[0], beside="LDG")]
    if family == "backward_rows":
        return [Step("STG", VECTOR, VECTOR / size[0], beside="LDG")]
    if family == "forward_columns":
        rows, soft, weighted = int(of[3]), "Soft" in of[2], "CrossEntropy<" in of[2] or "Soft" in of[2]
        width = rows * size[0]
        # What else is read in pieces of this width: probabilities, and weights of classes.
        probabilities = rows * size[1] // width if soft and min(rows * size[1], VECTOR) == width else 0
        weights = int(weighted and width == max(size[0], 4))
        return [Step("LDG", width, rows / (1 + probabilities + weights))]
    if family == "backward_columns":
        return [Step("STG", int(of[3]) * size[0], int(of[3]))]
    if family == "tiles":
        forward, grad = of[2] == "true", of[3] == "true"
        return [
            Step("LDG", VECTOR, VECTOR / size[0], beside="STS"),
            *([Step("LDS", size[0], without="STS")] if forward else []),
            *(
                [Step("STS", size[0], beside="LDS"), Step("STG", VECTOR, VECTOR / size[0], beside="LDS")]
                if grad
                else []
            ),
        ]
    if family in ("pointwise_dense", "pointwise_strided"):
        width = VECTOR if family == "pointwise_dense" else size[1]
        operands = 4 if "WithPositiveWeight" in of[2] or is_of_three(of[2]) else 3  # input, target and weight
        return [
            Step("LDG", width, width / size[1] / operands) if of[0] == "Sum" else Step("STG", width, width / size[1])
        ]
    if family == "indexed_rows":
        return [Step("STG" if of[0] == "Grad" else "LDG", VECTOR, VECTOR / size[1])]  # others may store a bad target
    if family == "indexed_columns":
        return [Step("LDG", size[1], 1 / 2) if of[0] == "Sum" else Step("STG", size[1])]  # input and weight
    if family in ("distil_forward", "distil_backward"):  # a student's and a teacher's number, of one width or two
        of_pair = Step("LDG", size[1], 1 / 2 if size[1] == size[2] else 1, without="STG")
        return [*([of_pair] if family == "distil_forward" else []), Step("STG", size[1], beside="LDG")]
    if family == "row_sums_kernel":  # an element is a column of all operands
        width, operands = int(of[1]), operands_of_row_sums(of[3])
        read = Step("LDG", width * size[2], width / operands, without="STG")
        return [read, Step("STG", width * size[2], width / operands)] if of[0] == "true" else [read]
    if family == "scale_kernel":
        return [Step("STG", VECTOR, VECTOR / size[0])]
    if family == "forward_targets":
        return [Step("STG", VECTOR)]  # of a bad target, one a row
    if family == "backward_targets":
        return [Step("STG", size[0], whole=True)]
    if family == "divisor_kernel":
        return [Step("LDG", 1)]  # a target of one byte, which stands beside one of eight
    if family == "indexed_divisor":
        return [Step("LDG", 8)]
    raise AssertionError(f"expected a kernel whose hot loops are told, got {name}: tell them in {__file__}")


def is_of_three(functor: str) -> bool:
    """Whether an element has a third operand of its own; a weight of the positive term is shared by many."""
    return functor.startswith(("GaussianNll", "MarginRanking"))


def operands_of_row_sums(loss: str) -> int:
    return {"CosineEmbedding": 2, "Triplet": 3, "Hinges": 1}[loss.partition("<")[0]]


def moved(name: str) -> int | None:
    """The bytes that an element moves; none where what is counted is a row."""
    family, of = arguments(name)
    size = [SIZES.get(argument, 0) for argument in of]
    if family in ("forward_rows", "forward_columns", "backward_rows", "backward_columns", "tiles"):
        writes = family.startswith("backward") or (family != "forward_columns" and of[3] == "true")
        return size[0] * (1 + writes) + (size[1] if "Soft" in of[2] else 0)
    if family.startswith("pointwise"):
        return size[1] * ((2 if of[0] == "Sum" else 3) + is_of_three(of[2]))
    if family in ("indexed_rows", "indexed_columns"):
        return size[1] * (1 if of[0] == "Sum" else 2)
    if family in ("distil_forward", "distil_backward"):
        return 2 * size[1] + size[2]
    if family == "row_sums_kernel":
        return size[2] * operands_of_row_sums(of[3]) * (2 if of[0] == "true" else 1)
    return 2 * size[0] if family == "scale_kernel" else None


def count(name: str, kernel: Kernel) -> float:
    """The instructions of an element in all hot loops, to the hundredth."""
    total = 0.0
    for step in steps(name):
        loop = step.loop(kernel)
        assert loop, f"expected a loop of {name} with {step}, got none: {__file__} tells how it is known"
        elements, instructions = step.of_pass(loop)
        total += instructions / elements
    return round(total, 2)
