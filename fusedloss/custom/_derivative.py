"""The derivatives of expressions, by SymPy, whose import takes half a second: import this module where it is needed."""

import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any

import sympy
from sympy.core.parameters import distribute

from ._expression import OF_ELEMENT, Tree, number
from ._stable import stable

# SymPy would rewrite functions that it knows, so ours are opaque to it: it knows their derivatives and nothing more.
# The difference x - t is opaque too, because SymPy would multiply out its product with a number. A rule takes the
# arguments and then their derivatives; conditions have none.
_RULES: dict[str, Callable[..., Any]] = {
    "minus": lambda a, b, da, db: da - db,
    "abs": lambda u, du: _of("sign", u) * du,
    "sqrt": lambda u, du: du / (2 * _of("sqrt", u)),
    "exp": lambda u, du: _of("exp", u) * du,
    "expm1": lambda u, du: _of("exp", u) * du,
    "log": lambda u, du: du / u,
    "log1p": lambda u, du: du / (1 + u),
    "sinh": lambda u, du: _of("cosh", u) * du,
    "cosh": lambda u, du: _of("sinh", u) * du,
    "tanh": lambda u, du: du / _of("cosh", u) ** 2,  # 1 - tanh^2 would cancel
    "log_cosh": lambda u, du: _of("tanh", u) * du,
    "sigmoid": lambda u, du: _of("sigmoid", u) * _of("sigmoid", -u) * du,
    "softplus": lambda u, du: _of("sigmoid", u) * du,
    "sin": lambda u, du: _of("cos", u) * du,
    "cos": lambda u, du: -_of("sin", u) * du,
    "atan": lambda u, du: du / (1 + u**2),
    # where the base is 0, the slope by the exponent is 0, as in torch
    "pow": lambda a, b, da, db: (
        b * _of("pow", a, b - 1) * da + _of("pow", a, b) * _select(_of(">", a, 0), _of("log", a), 0) * db
    ),
    "min": lambda a, b, da, db: _select(_of("<", a, b), da, _select(_of("==", a, b), (da + db) / 2, db)),
    "max": lambda a, b, da, db: _select(_of(">", a, b), da, _select(_of("==", a, b), (da + db) / 2, db)),
    "clamp": lambda a, low, high, da, dlow, dhigh: (
        _select(_of(">", a, high), dhigh, _select(_of("<", a, low), dlow, da))
    ),
    "select": lambda c, a, b, dc, da, db: _select(c, da, db),
}
_WITHOUT = ("sign", "<", "<=", ">", ">=", "==", "!=", "&&", "||", "!")


class _Known(sympy.Function):  # type: ignore[misc]
    def _eval_derivative(self, symbol: sympy.Symbol) -> sympy.Expr:
        slopes = [a.diff(symbol) for a in self.args]
        rule = _RULES.get(self.func.__name__)
        return sympy.S.Zero if rule is None or not any(slopes) else rule(*self.args, *slopes)


_CLASSES = {op: type(op, (_Known,), {}) for op in (*_RULES, *_WITHOUT)}


def _of(op: str, *args: Any) -> sympy.Expr:
    return _CLASSES[op](*args)


def _select(condition: sympy.Expr, a: Any, b: Any) -> sympy.Expr:
    return sympy.sympify(a) if a == b else _of("select", condition, a, b)


def _quotient(a: sympy.Expr, b: sympy.Expr, operands: Collection[str]) -> sympy.Expr:
    """a / b; if b = c + a / k with constants c and k, as k - k c / b, because the slopes of a and b nearly cancel."""
    constant, varying = a.as_independent(*(s for s in a.free_symbols if s.name in operands), as_Add=False)
    for k, term in ((1, a), (constant, varying)):
        c = b - term
        if varying != 1 and not any(s.name in operands for s in c.free_symbols):
            return k - k * c / b
    return a / b


def derivative(
    tree: Tree, name: str, operands: Collection[str] = OF_ELEMENT.names, through: Iterable[tuple[str, Tree]] = ()
) -> Tree:
    """The derivative with respect to a name, in a stable form that shares the terms of the tree.

    Where it is not unique it is what torch gives: 0 for abs at 0, the mean for min and max of equal arguments.
    ``through``: operands that depend on the name, with their slopes by it.

    Raises:
        ValueError: the expression divides by a constant that is 0.
    """
    tree = stable(tree)
    with distribute(False):  # 2 * (a + b) stays a product
        spelling = _Spelling(operands)
        value = spelling.to_sympy(tree)
        slope = value.diff(sympy.Symbol(name, real=True))
        for other, by_name in through:
            slope += value.diff(sympy.Symbol(other, real=True)) * spelling.to_sympy(by_name)
        return stable(spelling.to_tree(slope))


class _Spelling:
    """Converts between trees and SymPy's expressions.

    A term that the tree already has comes back as it is written there, so that a compiler sees that value and gradient
    share it.
    """

    def __init__(self, operands: Collection[str]) -> None:
        self.operands = operands
        self.trees: dict[sympy.Expr, Tree] = {}

    def to_sympy(self, tree: Tree) -> sympy.Expr:
        expression = self._to_sympy(tree)
        if expression.has(sympy.nan, sympy.zoo):
            raise ValueError("the expression divides by a constant that is 0")
        self.trees.setdefault(expression, tree)
        return expression

    def _to_sympy(self, tree: Tree) -> sympy.Expr:
        args = [self.to_sympy(a) for a in tree.args]
        match tree.op, args:
            case "number", _:
                return sympy.Rational(repr(tree.value))
            case "name", _:
                return sympy.Symbol(tree.name, real=True)
            case "+", (a, b):
                return a + b
            case "-", (a, b):
                names = a.name if a.is_Symbol else "", b.name if b.is_Symbol else ""
                if names in (("x", "t"), ("t", "x")):
                    return _of("minus", a, b) if names == ("x", "t") else -_of("minus", b, a)
                return a - b
            case "*", (a, b):
                return a * b
            case "/", (a, b):
                return _quotient(a, b, self.operands)
            case "neg", (a,):
                return -a
            case "square", (a,):
                return a**2
            case "pow", (a, b) if b.is_Integer and abs(b) <= 64:
                return a**b
            case "select", (condition, a, b):
                return _select(condition, a, b)
            case _:
                return _of(tree.op, *args)

    def to_tree(self, expression: sympy.Expr) -> Tree:
        if expression not in self.trees:
            self.trees[expression] = self._to_tree(expression)
        return self.trees[expression]

    def _to_tree(self, expression: sympy.Expr) -> Tree:
        if expression.is_Rational:
            if abs(expression) > sys.float_info.max:
                raise ValueError("a constant of the derivative is too large for float64")
            return number(float(expression))
        if expression.is_Symbol:
            return Tree("name", name=expression.name)
        if expression.is_Add:
            return self._sum(expression)
        if isinstance(expression, _Known):
            op = expression.func.__name__
            return Tree("-" if op == "minus" else op, tuple(map(self.to_tree, expression.args)))
        return self._product(expression)

    def _sum(self, expression: sympy.Expr) -> Tree:
        positive = [term for term in expression.args if term.as_coeff_Mul()[0] > 0]
        negative = [term for term in expression.args if term not in positive]
        tree = self.to_tree((positive or negative).pop(0))
        for term in positive:
            tree = Tree("+", (tree, self.to_tree(term)))
        for term in negative:
            tree = Tree("-", (tree, self.to_tree(-term)))
        return tree

    def _product(self, expression: sympy.Expr) -> Tree:
        """Multiplies parameters before operands, and divides once by each kind: a loop computes their part once."""
        coefficient, factors = expression.as_coeff_mul()
        over: dict[bool, list[Tree]] = {False: [], True: []}
        under: dict[bool, list[Tree]] = {False: [], True: []}
        if abs(coefficient) != 1:
            over[False].append(number(abs(float(coefficient))))
        for factor in factors:
            base, exponent = factor.as_base_exp()
            varies = any(symbol.name in self.operands for symbol in base.free_symbols)
            if exponent.is_negative:
                under[varies].append(self._power(base, -exponent))
            else:
                over[varies].append(self._power(base, exponent))
        # If no parameter is multiplied, the parameters divide the operands directly.
        first = over[False] or over[True] or [number(1)]
        tree = _chain("*", first)
        if under[False]:
            tree = Tree("/", (tree, _chain("*", under[False])))
        tree = _chain("*", [tree, *(over[True] if over[False] else [])])
        if under[True]:
            tree = Tree("/", (tree, _chain("*", under[True])))
        return _minus(tree) if coefficient < 0 else tree

    def _power(self, base: sympy.Expr, exponent: sympy.Expr) -> Tree:
        if exponent == 1 or base**exponent in self.trees:
            return self.to_tree(base**exponent)
        args = (self.to_tree(base),)
        return Tree("square", args) if exponent == 2 else Tree("pow", (*args, number(int(exponent))))


def _chain(op: str, trees: list[Tree]) -> Tree:
    tree = trees[0]
    for other in trees[1:]:
        tree = Tree(op, (tree, other))
    return tree


def _minus(tree: Tree) -> Tree:
    """Negates the first factor."""
    if tree.op == "number":
        return number(-tree.value)
    if tree.op in ("*", "/"):
        return Tree(tree.op, (_minus(tree.args[0]), tree.args[1]))
    return Tree("neg", (tree,))
