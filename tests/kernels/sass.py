"""Reads what nvdisasm writes of a kernel: its instructions, its loops, and the cheapest ways through both.

An instruction counts as one whether its predicate holds or not: it takes its turn all the same. A branch for a warp
whose threads have come apart (BRA.DIV) is not taken, and a call returns at once: what it calls is for numbers that are
rare, a denormal divisor or a row beyond the first 2^32.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

MEMORY = ("LDG", "STG", "LDS", "STS")  # global and shared
LINE = re.compile(
    r"^(?P<label>[.$][^\s:]+):"
    r"|^ +/\*[0-9a-f]+\*/ +(?P<predicate>@\S+)? *(?P<opcode>[A-Z][\w.]*) *(?P<operands>[^;]*?) *;$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: str = ""
    predicate: str = ""
    targets: tuple[int, ...] = ()  # the numbers, within the kernel, of those that a branch may go to

    @property
    def name(self) -> str:
        """A load or store whose kind of memory is decided as it runs is taken for one of global memory."""
        name = self.opcode.partition(".")[0]
        return {"LD": "LDG", "ST": "STG"}.get(name, name)

    @property
    def width(self) -> int:
        """The bytes that one thread reads or writes."""
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", self.opcode)
        return int(bits[1]) // 8 if bits else 4

    @property
    def ends_block(self) -> bool:
        return bool(self.targets) or self.name in ("EXIT", "RET")

    @property
    def may_go_on(self) -> bool:
        """Whether the next instruction may follow."""
        if self.predicate not in ("", "@PT", "@UPT"):
            return True
        if self.name == "BRA" and self.targets:
            return "," in self.operands  # a branch that has its condition among the operands
        return not self.ends_block


def read(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The kernels of a cubin by their mangled names, each with what it calls, from what nvdisasm -c wrote."""
    for section in text.split("\t.section\t.text.")[1:]:
        lines = list(LINE.finditer(section))
        places, number = {}, 0
        for line in lines:
            if line["label"]:
                places[line["label"]] = number
            else:
                number += 1
        yield section[: section.index(",")], [_instruction(line, places) for line in lines if line["opcode"]]


def _instruction(line: re.Match[str], places: dict[str, int]) -> Instruction:
    opcode, operands = line["opcode"], line["operands"]
    targets: tuple[int, ...] = ()
    if opcode.startswith(("BRA", "BRX", "JM")) and ".DIV" not in opcode:
        targets = tuple(places[label] for label in re.findall(r"\.L_x_\d+", operands))
        assert targets, f"expected a branch that says where to, got {line[0]}"
    return Instruction(opcode, operands, line["predicate"] or "", targets)


@dataclass(frozen=True)
class Block:
    instructions: Sequence[Instruction]
    after: tuple[int, ...]  # the blocks that may follow

    def count(self, wanted: Callable[[Instruction], bool]) -> int:
        return sum(map(wanted, self.instructions))


class Kernel:
    """The blocks that can be reached from the first, each before those that follow it; only loops lead back."""

    def __init__(self, code: Sequence[Instruction]):
        firsts = {0}
        for n, instruction in enumerate(code):
            firsts.update(instruction.targets)
            if instruction.ends_block:
                firsts.add(n + 1)
        starts = sorted(firsts - {len(code)})
        end_of = dict(zip(starts, [*starts[1:], len(code)], strict=True))

        def after(first: int) -> list[int]:
            last = code[end_of[first] - 1]
            next_one = [end_of[first]] if last.may_go_on and end_of[first] < len(code) else []
            return next_one + list(last.targets)

        order = _in_order(0, after)
        number = {first: n for n, first in enumerate(order)}
        self.blocks = [Block(code[first : end_of[first]], tuple(number[to] for to in after(first))) for first in order]

    @property
    def whole(self) -> "Part":
        every = range(len(self.blocks))
        return Part(self, 0, frozenset(every), frozenset(n for n in every if not self.blocks[n].after))

    @cached_property
    def loops(self) -> list["Part"]:
        """Each of a first block and all from which a way leads back to it; ended by those that lead there."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for n, block in enumerate(self.blocks):
            for to in block.after:
                before[to].append(n)
        above = _dominators(before)
        found = []
        for head, sources in enumerate(before):
            ends = [n for n in sources if head in above[n]]
            left, body = list(ends), {head}
            while left:
                n = left.pop()
                if n not in body:
                    body.add(n)
                    left += before[n]
            if ends:
                found.append(Part(self, head, frozenset(body), frozenset(ends)))
        return found

    @cached_property
    def innermost(self) -> list["Part"]:
        """The loops that read or write memory and hold no other that does."""
        moving = [loop for loop in self.loops if loop.count(lambda i: i.name in MEMORY)]
        heads = {loop.head for loop in moving}
        return [loop for loop in moving if heads & loop.body == {loop.head}]


@dataclass(frozen=True)
class Part:
    """A kernel, or one of its loops."""

    kernel: Kernel
    head: int
    body: frozenset[int]
    ends: frozenset[int]

    def count(self, wanted: Callable[[Instruction], bool]) -> int:
        return sum(self.kernel.blocks[n].count(wanted) for n in self.body)

    def ways(
        self, worth: Callable[[int], int], avoided: Collection[int] = (), free: Collection[int] = ()
    ) -> dict[int, int]:
        """The fewest instructions of a way through, for everything that the blocks on a way may be worth in sum.

        A loop within is gone through once or passed by; blocks that are free cost nothing.
        """
        blocks = self.kernel.blocks
        found: dict[int, dict[int, int]] = {self.head: {0: 0}}
        for n in sorted(self.body.difference(avoided)):
            if n not in found:
                continue
            more, cost = worth(n), 0 if n in free else len(blocks[n].instructions)
            found[n] = {before + more: spent + cost for before, spent in found[n].items()}
            for to in blocks[n].after:
                if to in self.body and to > n:
                    _keep_the_fewest(found.setdefault(to, {}), found[n])
        through: dict[int, int] = {}
        for end in self.ends.difference(avoided):
            _keep_the_fewest(through, found.get(end, {}))
        return through


def _keep_the_fewest(of: dict[int, int], more: dict[int, int]) -> None:
    for worth, spent in more.items():
        of[worth] = min(spent, of.get(worth, spent))


def _in_order(first: int, after: Callable[[int], Iterable[int]]) -> list[int]:
    """All that can be reached, each before what follows it, except where a loop leads back."""
    seen, left = {first}, []
    stack = [(first, iter(after(first)))]
    while stack:
        n, rest = stack[-1]
        to = next((to for to in rest if to not in seen), None)
        if to is None:
            left.append(n)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(after(to))))
    return left[::-1]


def _dominators(before: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block those that every way to it goes through, itself too."""
    every = set(range(len(before)))
    above = [{0}] + [every] * (len(before) - 1)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(before)):
            new = set.intersection(*(above[m] for m in before[n])) | {n}
            if new != above[n]:
                above[n], changed = new, True
    return above
