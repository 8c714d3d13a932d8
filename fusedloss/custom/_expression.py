"""Losses as expressions of what an element or a row has and of parameters, in the syntax of C++.

:func:`parse` reads an expression into a tree, and :func:`evaluate` computes a tree in PyTorch.

Every number is a real number: 1/2 is 0.5. Comparisons, ``&&``, ``||`` and ``!`` are conditions, which only
``c ? a : b`` and ``select(c, a, b)`` take; a condition has no derivative.
"""

import keyword
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """A number, a name, or an operator or function `op` applied to other trees.

    `neg` is the minus of one argument, `select` the ternary operator.
    """

    op: str
    args: tuple["Tree", ...] = ()
    value: float = 0.0  # where op is "number"
    name: str = ""  # where op is "name"


def number(value: float) -> Tree:
    return Tree("number", value=float(value))


def _softplus(u: Tensor) -> Tensor:
    return F.softplus(u, threshold=50)  # beyond the default of 20, a float64 would lose digits


# Twice differentiable at 0, unlike a form with abs(u).
def _log_cosh(u: Tensor) -> Tensor:
    return u + _softplus(-2 * u) - math.log(2)


# torch's derivative, the value plus 1, has no digits left far below 0.
def _expm1(u: Tensor) -> Tensor:
    return torch.where(u > -1, torch.expm1(u.clamp_min(-1)), torch.exp(u.clamp_max(-1)) - 1)


# The number of arguments and the formula. abs is torch's, whose derivative at 0 is 0.
FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "abs": (1, torch.abs),
    "sign": (1, torch.sign),
    "sqrt": (1, torch.sqrt),
    "square": (1, torch.square),
    "exp": (1, torch.exp),
    "expm1": (1, _expm1),
    "log": (1, torch.log),
    "log1p": (1, torch.log1p),
    "sinh": (1, torch.sinh),
    "cosh": (1, torch.cosh),
    "tanh": (1, torch.tanh),
    "log_cosh": (1, _log_cosh),
    "sigmoid": (1, torch.sigmoid),
    "softplus": (1, _softplus),
    "sin": (1, torch.sin),
    "cos": (1, torch.cos),
    "atan": (1, torch.atan),
    "pow": (2, torch.pow),
    "min": (2, torch.minimum),
    "max": (2, torch.maximum),
    "clamp": (3, torch.clamp),
    "select": (3, torch.where),
}
_ALIASES = {"fabs": "abs", "fmin": "min", "fmax": "max"}

PRECEDENCE = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 4, "<=": 4, ">": 4, ">=": 4, "+": 5, "-": 5, "*": 6, "/": 6}
_LOGICAL = ("&&", "||", "!")
CONDITIONS = ("==", "!=", "<", "<=", ">", ">=", *_LOGICAL)


class Operands(NamedTuple):
    """What the expressions of a kind of loss name beside parameters."""

    names: tuple[str, ...]
    meaning: str
    arguments: tuple[str, ...]  # what a call of the loss takes by name


OF_ELEMENT = Operands(
    ("x", "t"),
    "x is the prediction and t the target",
    ("self", "input", "target", "reduction", "weight", "ignore_index"),
)
OF_THREE = Operands(
    ("x", "t", "v"), "x is the prediction, t the target and v the third operand", (*OF_ELEMENT.arguments, "third")
)
OF_ROW = Operands(
    ("ce", "nll", "p", "q", "lse", "weight"),
    "ce, nll, p, q, lse and weight are what a row is known by",
    ("self", "input", "target", "reduction", "ignore_index", "label_smoothing", "sample_weight"),
)


def check_parameters(names: Iterable[str], operands: Operands = OF_ELEMENT) -> None:
    """Raises ValueError for the first name that no parameter can have."""
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or keyword.iskeyword(name):
            raise ValueError(f"expected an identifier for the name of a parameter, got {name!r}")
        if name in operands.names:
            raise ValueError(f"a parameter cannot be named {name}: {operands.meaning}")
        if name in FUNCTIONS or name in _ALIASES:
            raise ValueError(f"a parameter cannot be named {name}: that is a function")
        if name in operands.arguments:
            raise ValueError(f"a parameter cannot be named {name}: that is an argument of every loss")


_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?)|(?P<name>(?:std::)?[A-Za-z_]\w*)"
    r"|(?P<operator>[<>=!]=|&&|\|\||[-+*/()<>!?:,])|(?P<space>\s+)",
    re.ASCII,
)


def parse(source: str, parameters: Iterable[str] = (), operands: Operands = OF_ELEMENT) -> Tree:
    """Reads an expression whose value is a number.

    Args:
        source: the expression, in C++ syntax: numbers, operands and parameters; ``+ - * /``; comparisons, ``&& || !``
            and ``c ? a : b``; and the functions of ``FUNCTIONS``, also with ``std::`` before them.
        parameters: the names it may use beside the operands.
        operands: x and t, those and v, or those of a row.

    Raises:
        ValueError: a syntax error, an unknown name, a call with a wrong number of arguments, a condition in place of a
            number or the reverse, each with the expression and a caret under the place; or a name that no parameter can
            have.
        TypeError: the expression is no string.
    """
    if not isinstance(source, str):
        raise TypeError(f"an expression must be a string, got {type(source).__name__}")
    parameters = tuple(parameters)
    check_parameters(parameters, operands)
    try:
        return _Parser(source, parameters, operands.names).whole()
    except RecursionError:
        raise ValueError("the expression is nested too deeply") from None


# What is written otherwise in Python or in torch, and how it is written here; added to the first mistake that is found.
_HINTS = {
    r"\*\*|\^": "a power is pow(u, v)",
    r"\b(torch|F|math|np|numpy)\s*\.": "functions are called by their names alone",
    r"\bif\b.*\belse\b": "a choice is c ? a : b",
    r"\b(and|or|not)\b": "and, or, not are &&, ||, !",
    r"\brelu\b": "relu(u) is max(u, 0)",
}


class _Parser:
    def __init__(self, source: str, parameters: tuple[str, ...], operands: tuple[str, ...]) -> None:
        self.source, self.parameters, self.operands = source, parameters, operands
        self.tokens: list[tuple[str, str, int]] = []  # kind, text, where
        at = 0
        while at < len(source):
            found = _TOKEN.match(source, at)
            if found is None:
                raise self.error(f"unexpected character {source[at]!r}", at)
            if found.lastgroup != "space":
                self.tokens.append((str(found.lastgroup), found[0], at))
            at = found.end()
        self.tokens.append(("end", "", len(source.rstrip())))
        self.next = 0

    @property
    def token(self) -> str:
        return self.tokens[self.next][1]

    @property
    def where(self) -> int:
        return self.tokens[self.next][2]

    def error(self, message: str, where: int) -> ValueError:
        start = self.source.rfind("\n", 0, where) + 1
        line = self.source[start:].split("\n")[0].replace("\t", " ")
        message += next((f" ({hint})" for sign, hint in _HINTS.items() if re.search(sign, self.source)), "")
        return ValueError(f"{message}\n  {line}\n  {' ' * (where - start)}^")

    def expected(self, what: str) -> ValueError:
        return self.error(f"expected {what}, got {repr(self.token) if self.token else 'the end'}", self.where)

    def accept(self, token: str) -> bool:
        if self.token != token:
            return False
        self.next += 1
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.expected(repr(token))

    def whole(self) -> Tree:
        tree = self.operand("number", self.ternary)
        if self.token:
            raise self.expected("an operator")
        return tree

    def operand(self, kind: str, read: Callable[[], Tree]) -> Tree:
        where = self.where
        tree = read()
        found = "condition" if tree.op in CONDITIONS else "number"
        if found != kind:
            raise self.error(f"expected a {kind}, got a {found}", where)
        return tree

    def ternary(self) -> Tree:
        where = self.where
        condition = self.binary(1)
        if self.token != "?":
            return condition
        if condition.op not in CONDITIONS:
            raise self.error("expected a condition, got a number", where)
        self.next += 1
        then = self.operand("number", self.ternary)
        self.expect(":")
        return Tree("select", (condition, then, self.operand("number", self.ternary)))

    def binary(self, lowest: int) -> Tree:
        where = self.where
        left = self.unary()
        while PRECEDENCE.get(self.token, 0) >= lowest:
            op = self.token
            kind = "condition" if op in _LOGICAL else "number"
            if (left.op in CONDITIONS) != (kind == "condition"):
                raise self.error(f"{op} needs a {kind} here", where)
            self.next += 1
            left = Tree(op, (left, self.operand(kind, partial(self.binary, PRECEDENCE[op] + 1))))
        return left

    def unary(self) -> Tree:
        if self.accept("!"):
            return Tree("!", (self.operand("condition", self.unary),))
        if self.accept("+"):
            return self.operand("number", self.unary)
        if self.accept("-"):
            tree = self.operand("number", self.unary)
            return number(-tree.value) if tree.op == "number" else Tree("neg", (tree,))
        return self.primary()

    def primary(self) -> Tree:
        kind, token, where = self.tokens[self.next]
        if self.accept("("):
            tree = self.ternary()
            self.expect(")")
            return tree
        if kind not in ("number", "name"):
            raise self.expected("a number, a name or '('")
        self.next += 1
        if kind == "number":
            return self.number(token, where)
        bare = token.removeprefix("std::")
        function = _ALIASES.get(bare, bare)
        if function in FUNCTIONS:
            return self.call(function, where)
        if token not in (*self.operands, *self.parameters):
            given = f", the parameter{'s' * (len(self.parameters) > 1)} {', '.join(self.parameters)}"
            operands = ", ".join(self.operands)
            known = (
                f"{operands}{given if self.parameters else ''}, and the functions {', '.join([*FUNCTIONS, *_ALIASES])}"
            )
            raise self.error(f"unknown name {token!r}; known are {known}", where)
        if self.token == "(":
            raise self.error(f"{token} is not a function", where)
        return Tree("name", name=token)

    def number(self, token: str, where: int) -> Tree:
        value = float(token.rstrip("fF"))
        if math.isinf(value):
            raise self.error("a number too large for float64", where)
        return number(value)

    def call(self, function: str, where: int) -> Tree:
        wanted, args = FUNCTIONS[function][0], list[Tree]()
        self.expect("(")
        while not self.accept(")"):
            if args and not self.accept(","):
                raise self.expected("',' or ')'")
            kind = "condition" if function == "select" and not args else "number"
            args.append(self.operand(kind, self.ternary))
        if len(args) != wanted:
            raise self.error(f"{function} takes {wanted} argument{'s' * (wanted > 1)}, got {len(args)}", where)
        return Tree(function, tuple(args))


_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "neg": operator.neg,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "&&": operator.and_,
    "||": operator.or_,
    "!": operator.invert,
}


def evaluate(tree: Tree, values: Mapping[str, Tensor | float]) -> Tensor:
    """Computes a tree in PyTorch; the result has the shape that the tensors among the values broadcast to.

    It can be differentiated any number of times, transformed by torch.func and compiled. Where a derivative is not
    unique, such as that of abs at 0, it is the one that torch chooses.

    Args:
        tree: the expression, best rewritten for stability.
        values: the numbers for operands and parameters. The arithmetic has the dtype of the tensors, so bfloat16 and
            float16 should be converted to float32 before.
    """
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    dtype, device = torch.float64, torch.device("cpu")
    if tensors:
        device = next((tensor.device for tensor in tensors if tensor.dim()), tensors[0].device)
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)

    def lifted(value: Tensor | float) -> Tensor:
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)

    def computed(tree: Tree) -> Tensor | float:
        if tree.op == "number":
            return tree.value
        if tree.op == "name":
            return values[tree.name]
        args = [computed(a) for a in tree.args]
        if tree.op in FUNCTIONS:
            return FUNCTIONS[tree.op][1](*map(lifted, args))
        if not any(isinstance(a, Tensor) for a in args):
            args[0] = lifted(args[0])  # Python's own arithmetic raises where that of tensors gives infinity or NaN
        result: Tensor = _OPERATORS[tree.op](*args)
        return result

    return lifted(computed(tree)).expand(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)))


def names(tree: Tree) -> frozenset[str]:
    """The operands and parameters that a tree depends on."""
    return frozenset([tree.name]) if tree.op == "name" else frozenset().union(*map(names, tree.args))


def renamed(tree: Tree, names: Mapping[str, str]) -> Tree:
    """The tree with other names for some of its names."""
    if tree.op == "name":
        return replace(tree, name=names.get(tree.name, tree.name))
    return replace(tree, args=tuple(renamed(a, names) for a in tree.args))


_X, _T = Tree("name", name="x"), Tree("name", name="t")
DIFFERENCES = (Tree("-", (_X, _T)), Tree("-", (_T, _X)))


def of_difference(tree: Tree) -> bool:
    """Whether x and t occur only as x - t or t - x, so that d/dt = -d/dx; False where that takes algebra to see."""
    if tree in DIFFERENCES:
        return True
    return tree not in (_X, _T) and all(map(of_difference, tree.args))
