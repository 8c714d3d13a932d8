"""Rewriting of expressions of a row: nothing near 1 is taken from 1, and no power of p underflows before it must.

p is e^-nll and q is 1 - p. Both are formed without cancellation, so that q keeps the digits of a confident row and nll
those of a hopeless one.
"""

from dataclasses import replace

from ._expression import Tree, number
from ._stable import negated, rewritten

_NLL, _P, _Q = (Tree("name", name=name) for name in ("nll", "p", "q"))
_ONE = number(1)


def stable_in_row(tree: Tree) -> Tree:
    """As :func:`stable <fusedloss.custom._stable.stable>`, with what is known of p, q and nll."""
    return _in_row(rewritten(replace(tree, args=tuple(map(stable_in_row, tree.args)))))


def _in_row(tree: Tree) -> Tree:
    match tree:
        case Tree("-", (a, b)) if (a, b) in ((_ONE, _P), (_ONE, _Q)):
            return _Q if b == _P else _P
        case Tree("-", (a, b)) if (a, b) in ((_P, _ONE), (_Q, _ONE)):
            return negated(_Q if a == _P else _P)
        case Tree("log", (a,)) if a == _P:
            return negated(_NLL)
        case Tree("log1p", (a,)) if a == negated(_Q):
            return negated(_NLL)
        case Tree("log1p", (a,)) if a == negated(_P):
            return Tree("log", (_Q,))
        case Tree("exp", (a,)) if a == negated(_NLL):
            return _P
        case Tree("expm1", (a,)) if a == negated(_NLL):
            return negated(_Q)
        case Tree("sqrt", (a,)) if a == _P:
            return _power_of_p(number(0.5))
        case Tree("pow", (a, exponent)) if a == _P:
            return _power_of_p(exponent)
        case Tree("-", (a, Tree("exp", (u,)))) if a == _ONE:
            return negated(_in_row(Tree("expm1", (u,))))
        case Tree("-", (Tree("exp", (u,)), a)) if a == _ONE:
            return _in_row(Tree("expm1", (u,)))
        case _:
            return tree


def _power_of_p(exponent: Tree) -> Tree:
    return Tree("exp", (negated(Tree("*", (exponent, _NLL))),))
