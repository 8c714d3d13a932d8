"""Printing of expressions: :func:`text` for people, :func:`cpp` for the compiler."""

from collections.abc import Callable, Collection
from functools import partial

from ._expression import OF_ELEMENT, PRECEDENCE, Tree, names, number
from ._stable import looks_negative, negated

_UNARY, _PRIMARY = 7, 8  # above every operator of PRECEDENCE


def text(tree: Tree) -> str:
    """Prints a tree as an expression, which ``parse`` reads into an equal tree."""
    return _printed(tree, _as_text)[0]


def cpp(tree: Tree, operands: Collection[str] = OF_ELEMENT.names) -> str:
    """Prints a tree in C++ for an arithmetic type T, with the functions of csrc/losses/functions.h.

    There are no branches. A divisor without operands becomes a factor 1 / divisor, which a loop computes once.
    """
    return _printed(tree, partial(_as_cpp, operands))[0]


_Printed = tuple[str, int]  # the text, and the precedence of its outermost operator


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
        case Tree(op, (a, b)) if op in PRECEDENCE:
            level = PRECEDENCE[op]
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


def _as_cpp(operands: Collection[str], tree: Tree) -> _Printed | None:
    def printed(tree: Tree) -> str:
        return cpp(tree, operands)

    def varies(tree: Tree) -> bool:
        return not names(tree).isdisjoint(operands)

    match tree:
        case Tree("number"):
            return f"T({_digits(tree.value)})", _PRIMARY
        case Tree("&&" | "||" as op, (a, b)):
            return f"bool(int({printed(a)}) {op[0]} int({printed(b)}))", _PRIMARY
        case Tree("/", (a, b)) if varies(a) and not varies(b) and b != number(1):
            return _printed(Tree("*", (a, Tree("/", (number(1), b)))), partial(_as_cpp, operands))
        case Tree("pow", (a, Tree("number", _, exponent))) if exponent.is_integer() and abs(exponent) <= 64:
            return f"integer_power<{int(exponent)}>({printed(a)})", _PRIMARY
        case Tree("sigmoid" | "softplus" as op, (a,)) if looks_negative(a):
            return f"{op}_of_minus({printed(negated(a))})", _PRIMARY
        case _:
            return None


def _digits(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e9 else repr(value)
