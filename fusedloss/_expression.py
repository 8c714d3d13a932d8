"""Pointwise losses as expressions of x, t and parameters, in the syntax of C++.

:func:`parse` reads one into a tree, :func:`stable` rewrites what loses digits or overflows, :func:`derivative` gives
the tree of a derivative, :func:`text` and :func:`cpp` print a tree, and :func:`evaluate` computes it in PyTorch.

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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Tree", "cpp", "derivative", "evaluate", "names", "of_difference", "parse", "stable", "text"]


@dataclass(frozen=True)
class Tree:
    """A number, a name, or an operator or function (`op`) of other trees. `neg` is the minus of one argument, `select`
    the ternary."""

    op: str
    args: tuple["Tree", ...] = ()
    value: float = 0.0  # of a number
    name: str = ""  # of a name


def number(value: float) -> Tree:
    return Tree("number", value=float(value))


def _softplus(u: Tensor) -> Tensor:
    return F.softplus(u, threshold=50)  # beyond the default of 20, a float64 would lose digits


# In this form twice differentiable at 0, where one of abs(u) is not.
def _log_cosh(u: Tensor) -> Tensor:
    return u + _softplus(-2 * u) - math.log(2)


# Each with its number of arguments and its formula; abs is torch's, so that its derivative at 0 is 0.
FUNCTIONS: dict[str, tuple[int, Callable[..., Tensor]]] = {
    "abs": (1, torch.abs),
    "sign": (1, torch.sign),
    "sqrt": (1, torch.sqrt),
    "square": (1, torch.square),
    "exp": (1, torch.exp),
    "expm1": (1, torch.expm1),
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

_PRECEDENCE = {"||": 1, "&&": 2, "==": 3, "!=": 3, "<": 4, "<=": 4, ">": 4, ">=": 4, "+": 5, "-": 5, "*": 6, "/": 6}
_UNARY, _PRIMARY = 7, 8
_LOGICAL = ("&&", "||", "!")
_CONDITIONS = ("==", "!=", "<", "<=", ">", ">=", *_LOGICAL)

# Names that a parameter cannot have: C++ keywords, and what stands in the code around the expression.
_RESERVED = frozenset(
    """
    alignas alignof and and_eq asm auto bitand bitor bool break case catch char char8_t char16_t char32_t class compl
    concept const consteval constexpr constinit const_cast continue co_await co_return co_yield decltype default delete
    do double dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable
    namespace new noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast
    requires return short signed sizeof static static_assert static_cast struct switch template this thread_local throw
    true try typedef typeid typename union unsigned using virtual void volatile wchar_t while xor xor_eq
    T std fusedloss functions of_difference valid value grad params integer_power sigmoid_of_minus softplus_of_minus
    NAN INFINITY linux unix
    """.split()
)


def check_parameters(names: Iterable[str]) -> None:
    """Raises ValueError for the first name that no parameter can have."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or keyword.iskeyword(name):
            raise ValueError(f"expected an identifier for the name of a parameter, got {name!r}")
        if name in ("x", "t"):
            raise ValueError(f"a parameter cannot be named {name}: x is the prediction and t the target")
        if name in FUNCTIONS or name in _ALIASES:
            raise ValueError(f"a parameter cannot be named {name}: that is a function")
        if name in _RESERVED or "__" in name or re.match("_[A-Z]", name):
            raise ValueError(f"a parameter cannot be named {name}: C++ reserves that name")


_TOKEN = re.compile(
    r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fF]?)|(?P<name>(?:std::)?[A-Za-z_]\w*)"
    r"|(?P<operator>[<>=!]=|&&|\|\||[-+*/()<>!?:,])|(?P<space>\s+)",
    re.ASCII,
)


def parse(source: str, parameters: Iterable[str] = ()) -> Tree:
    """The tree of an expression that is a number.

    Args:
        source: the expression, in C++: numbers, x, t and parameters; ``+ - * /``; comparisons, ``&& || !`` and
            ``c ? a : b``; and the functions of ``FUNCTIONS``, also with ``std::`` before them.
        parameters: the names it may use beside x and t.

    Raises:
        ValueError: a syntax error, an unknown name, a call with another number of arguments, a condition where a number
            is needed or the reverse, each with the expression and a caret under the place; or a parameter cannot have
            its name.
    """
    parameters = tuple(parameters)
    check_parameters(parameters)
    try:
        return _Parser(source, parameters).whole()
    except RecursionError:
        raise ValueError("the expression is nested too deeply") from None


class _Parser:
    def __init__(self, source: str, parameters: tuple[str, ...]) -> None:
        self.source, self.parameters = source, parameters
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
        found = "condition" if tree.op in _CONDITIONS else "number"
        if found != kind:
            raise self.error(f"expected a {kind}, got a {found}", where)
        return tree

    def ternary(self) -> Tree:
        where = self.where
        condition = self.binary(1)
        if self.token != "?":
            return condition
        if condition.op not in _CONDITIONS:
            raise self.error("expected a condition, got a number", where)
        self.next += 1
        then = self.operand("number", self.ternary)
        self.expect(":")
        return Tree("select", (condition, then, self.operand("number", self.ternary)))

    def binary(self, lowest: int) -> Tree:
        where = self.where
        left = self.unary()
        while _PRECEDENCE.get(self.token, 0) >= lowest:
            op = self.token
            kind = "condition" if op in _LOGICAL else "number"
            if (left.op in _CONDITIONS) != (kind == "condition"):
                raise self.error(f"{op} needs a {kind} here", where)
            self.next += 1
            left = Tree(op, (left, self.operand(kind, partial(self.binary, _PRECEDENCE[op] + 1))))
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
        if token not in ("x", "t", *self.parameters):
            given = f", the parameter{'s' * (len(self.parameters) > 1)} {', '.join(self.parameters)}"
            known = f"x, t{given if self.parameters else ''}, and the functions {', '.join([*FUNCTIONS, *_ALIASES])}"
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
            if args:
                self.expect(",")
            kind = "condition" if function == "select" and not args else "number"
            args.append(self.operand(kind, self.ternary))
        if len(args) != wanted:
            raise self.error(f"{function} takes {wanted} argument{'s' * (wanted > 1)}, got {len(args)}", where)
        return Tree(function, tuple(args))


def text(tree: Tree) -> str:
    """The expression of a tree: what :func:`parse` reads into an equal tree."""
    return _printed(tree, _as_text)[0]


def cpp(tree: Tree) -> str:
    """The same in C++ for an arithmetic type T, where csrc/losses/functions.h is: without branches, and what holds
    neither x nor t as a value that a loop needs only once."""
    return _printed(tree, _as_cpp)[0]


_Printed = tuple[str, int]  # with the precedence of its operator


def _printed(tree: Tree, special: Callable[[Tree], _Printed | None]) -> _Printed:
    if (found := special(tree)) is not None:
        return found

    def operand(tree: Tree, lowest: int, on_right: bool = False) -> str:
        shown, precedence = _printed(tree, special)
        return f"({shown})" if precedence < lowest or (on_right and shown.startswith("-")) else shown

    match tree:
        case Tree("name"):
            return tree.name, _PRIMARY
        case Tree("neg" | "!" as op, (a,)):
            return f"{'-' if op == 'neg' else op}{operand(a, _PRIMARY)}", _UNARY
        case Tree(op, (a, b)) if op in _PRECEDENCE:
            level = _PRECEDENCE[op]
            return f"{operand(a, level)} {op} {operand(b, level + 1, op in '+-')}", level
        case _:
            return f"{tree.op}({', '.join(operand(a, 0) for a in tree.args)})", _PRIMARY


def _as_text(tree: Tree) -> _Printed | None:
    match tree:
        case Tree("number"):
            return _digits(tree.value), _UNARY if tree.value < 0 else _PRIMARY
        case Tree("select", (condition, a, b)):
            shown, precedence = _printed(condition, _as_text)
            return f"{shown if precedence else f'({shown})'} ? {text(a)} : {text(b)}", 0
        case _:
            return None


def _as_cpp(tree: Tree) -> _Printed | None:
    match tree:
        case Tree("number"):
            return f"T({_digits(tree.value)})", _PRIMARY
        case Tree("&&" | "||" as op, (a, b)):
            return f"bool(int({cpp(a)}) {op[0]} int({cpp(b)}))", _PRIMARY
        case Tree("/", (a, b)) if _varies(a) and not _varies(b) and b != number(1):
            return _printed(Tree("*", (a, Tree("/", (number(1), b)))), _as_cpp)
        case Tree("pow", (a, Tree("number", _, exponent))) if exponent.is_integer() and abs(exponent) <= 64:
            return f"integer_power<{int(exponent)}>({cpp(a)})", _PRIMARY
        case Tree("sigmoid" | "softplus" as op, (a,)) if _looks_negative(a):
            return f"{op}_of_minus({cpp(_negated(a))})", _PRIMARY
        case _:
            return None


def _digits(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e9 else repr(value)


def names(tree: Tree) -> frozenset[str]:
    """x, t and the parameters that a tree depends on."""
    return frozenset([tree.name]) if tree.op == "name" else frozenset().union(*map(names, tree.args))


def _varies(tree: Tree) -> bool:
    return not names(tree).isdisjoint("xt")


_X, _T = Tree("name", name="x"), Tree("name", name="t")
_DIFFERENCES = (Tree("-", (_X, _T)), Tree("-", (_T, _X)))


def of_difference(tree: Tree) -> bool:
    """Whether x and t occur only as x - t or t - x, so that d/dt = -d/dx; False where that takes algebra to see."""
    if tree in _DIFFERENCES:
        return True
    return tree not in (_X, _T) and all(map(of_difference, tree.args))


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
    """The value of a tree in PyTorch, of the shape that the tensors among the values broadcast to.

    It can be differentiated any number of times, transformed by torch.func and compiled. Where a derivative is not
    unique, as that of abs at 0, it is torch's choice, which :func:`derivative` shares.

    Args:
        tree: best as :func:`stable` gives it.
        values: of x, t and the parameters. Arithmetic is done in the dtype of the tensors: what is stored in bfloat16
            or float16 should come as float32.
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


def stable(tree: Tree) -> Tree:
    """The same function without what overflows or loses digits: log(1 + exp(u)) is softplus(u), 1 / (1 + exp(-u)) is
    sigmoid(u), log(cosh(u)) is log_cosh(u), and so on; numbers are computed."""
    return _rewritten(replace(tree, args=tuple(map(stable, tree.args))))


def _call(op: str, *args: Tree) -> Tree:
    return _rewritten(Tree(op, args))


def _rewritten(tree: Tree) -> Tree:
    """Of a tree whose arguments are already stable."""
    one = number(1)
    if tree.args and tree.op not in _CONDITIONS and all(a.op == "number" for a in tree.args):
        folded = float(evaluate(tree, {}))
        return number(folded) if math.isfinite(folded) else tree
    match tree:
        case Tree("neg", (Tree("neg", (u,)),)):
            return u
        case Tree("*", (Tree("neg", (u,)), Tree("neg", (v,)))):
            return _call("*", u, v)
        case Tree("*", (u, Tree("neg", (v,)))):
            return Tree("neg", (_call("*", u, v),))
        case Tree("+" | "-" as op, (a, Tree("neg", (b,)))):
            return _call("-" if op == "+" else "+", a, b)
        case Tree("log1p", (Tree("exp", (u,)),)):
            return _call("softplus", u)
        case Tree("log", (Tree("+", (a, Tree("exp", (u,))) | (Tree("exp", (u,)), a)),)) if a == one:
            return _call("softplus", u)
        case Tree("log", (Tree("sigmoid", (u,)),)):
            return Tree("neg", (_call("softplus", _negated(u)),))
        case Tree("log", (Tree("cosh", (u,)),)) | Tree("log_cosh", (Tree("abs", (u,)),)):
            return _call("log_cosh", u)
        case Tree("abs" | "cosh" | "log_cosh" as op, (Tree("neg", (u,)),)):
            return _call(op, u)
        case Tree("/", (a, Tree("+", (b, Tree("exp", (u,))) | (Tree("exp", (u,)), b)))) if b == one:
            if a == one:
                return _call("sigmoid", _negated(u))
            return _call("sigmoid", u) if a == Tree("exp", (u,)) else _call("*", a, _call("sigmoid", _negated(u)))
        case Tree("/", (Tree("sinh", (u,)), Tree("cosh", (v,)))) if u == v:
            return _call("tanh", u)
        case Tree("-", (a, Tree("sigmoid", (u,)))) if a == one:
            return _call("sigmoid", _negated(u))
        case Tree("pow", (u, Tree("number", _, exponent))) if exponent in (0.5, 1, 2):
            return u if exponent == 1 else _call("sqrt" if exponent == 0.5 else "square", u)
        case Tree("+" | "-"):
            return _with_log_cosh(tree)
        case _:
            return tree


def _with_log_cosh(tree: Tree) -> Tree:
    """With log_cosh(u) for u + softplus(-2 u) - log(2), in any order and among other terms."""
    terms = _terms(tree)
    for term in terms:
        match term:
            case Tree("softplus", (doubled,)):
                u = _half(_negated(doubled))
            case _:
                continue
        logs = [a for a in terms if a.op == "number" and abs(a.value + math.log(2)) < 1e-12]
        if u is None or u not in terms or not logs:
            continue
        rest = list(terms)
        for gone in (term, u, logs[0]):
            rest.remove(gone)
        tree = _call("log_cosh", u)
        for other in rest:
            tree = Tree("-", (tree, _negated(other))) if _looks_negative(other) else Tree("+", (tree, other))
        return tree
    return tree


def _terms(tree: Tree) -> list[Tree]:
    match tree:
        case Tree("+", (a, b)):
            return _terms(a) + _terms(b)
        case Tree("-", (a, b)) if tree not in _DIFFERENCES:
            return _terms(a) + [_negated(term) for term in _terms(b)]
        case _:
            return [tree]


def _half(tree: Tree) -> Tree | None:
    match tree:
        case Tree("*", (a, u) | (u, a)) if a == number(2):
            return u
        case _:
            return None


def _looks_negative(tree: Tree) -> bool:
    match tree:
        case Tree("number"):
            return tree.value < 0
        case Tree("*" | "/", (a, _)):
            return _looks_negative(a)
        case _:
            return tree.op == "neg" or tree == _DIFFERENCES[1]


def _negated(tree: Tree) -> Tree:
    match tree:
        case Tree("number"):
            return number(-tree.value)
        case Tree("neg", (u,)):
            return u
        case Tree("-", (a, b)):
            return Tree("-", (b, a))
        case Tree("*" | "/" as op, (a, b)) if _looks_negative(a) or a.op == "number":
            return Tree(op, (_negated(a), b))
        case _:
            return Tree("neg", (tree,))


def derivative(tree: Tree, name: str) -> Tree:
    """The derivative with respect to a name, by SymPy, in a :func:`stable` form that shares the terms of the tree.

    Where it is not unique it is what torch gives: 0 for abs at 0, the mean for min and max of equals. SymPy is imported
    here, on the first call.

    Raises:
        ValueError: the expression divides by a constant that is 0.
    """
    from . import _derivative

    return _derivative.derivative(stable(tree), name)
