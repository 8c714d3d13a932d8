"""Rewriting of expressions for stability: the same function without what overflows or loses digits."""

import math
from dataclasses import replace

from ._expression import CONDITIONS, DIFFERENCES, Tree, evaluate, number


def stable(tree: Tree) -> Tree:
    """Replaces what overflows or loses digits, and computes what holds only numbers.

    log(1 + exp(u)) becomes softplus(u), 1 / (1 + exp(-u)) sigmoid(u), log(cosh(u)) log_cosh(u), and so on.
    """
    return rewritten(replace(tree, args=tuple(map(stable, tree.args))))


def _call(op: str, *args: Tree) -> Tree:
    return rewritten(Tree(op, args))


def rewritten(tree: Tree) -> Tree:
    """Rewrites the outermost operator of a tree whose arguments are already stable."""
    one = number(1)
    if tree.args and tree.op not in CONDITIONS and all(a.op == "number" for a in tree.args):
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
            return Tree("neg", (_call("softplus", negated(u)),))
        case Tree("log", (Tree("cosh", (u,)),)) | Tree("log_cosh", (Tree("abs", (u,)),)):
            return _call("log_cosh", u)
        case Tree("abs" | "cosh" | "log_cosh" as op, (Tree("neg", (u,)),)):
            return _call(op, u)
        case Tree("/", (a, Tree("+", (b, Tree("exp", (u,))) | (Tree("exp", (u,)), b)))) if b == one:
            if a == one:
                return _call("sigmoid", negated(u))
            return _call("sigmoid", u) if a == Tree("exp", (u,)) else _call("*", a, _call("sigmoid", negated(u)))
        case Tree("/", (Tree("sinh", (u,)), Tree("cosh", (v,)))) if u == v:
            return _call("tanh", u)
        case Tree("-", (a, Tree("sigmoid", (u,)))) if a == one:
            return _call("sigmoid", negated(u))
        case Tree("pow", (u, Tree("number", _, exponent))) if exponent in (0.5, 1, 2):
            return u if exponent == 1 else _call("sqrt" if exponent == 0.5 else "square", u)
        case Tree("+" | "-"):
            return _with_log_cosh(tree)
        case _:
            return tree


def _with_log_cosh(tree: Tree) -> Tree:
    """Replaces u + softplus(-2 u) - log(2), in any order and among other terms, by log_cosh(u)."""
    terms = _terms(tree)
    for term in terms:
        match term:
            case Tree("softplus", (doubled,)):
                u = _half(negated(doubled))
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
            tree = Tree("-", (tree, negated(other))) if looks_negative(other) else Tree("+", (tree, other))
        return tree
    return tree


def _terms(tree: Tree) -> list[Tree]:
    match tree:
        case Tree("+", (a, b)):
            return _terms(a) + _terms(b)
        case Tree("-", (a, b)) if tree not in DIFFERENCES:
            return _terms(a) + [negated(term) for term in _terms(b)]
        case _:
            return [tree]


def _half(tree: Tree) -> Tree | None:
    match tree:
        case Tree("*", (a, u) | (u, a)) if a == number(2):
            return u
        case _:
            return None


def looks_negative(tree: Tree) -> bool:
    match tree:
        case Tree("number"):
            return tree.value < 0
        case Tree("*" | "/", (a, _)):
            return looks_negative(a)
        case _:
            return tree.op == "neg" or tree == DIFFERENCES[1]


def negated(tree: Tree) -> Tree:
    match tree:
        case Tree("number"):
            return number(-tree.value)
        case Tree("neg", (u,)):
            return u
        case Tree("-", (a, b)):
            return Tree("-", (b, a))
        case Tree("*" | "/" as op, (a, b)) if looks_negative(a) or a.op == "number":
            return Tree(op, (negated(a), b))
        case _:
            return Tree("neg", (tree,))
