"""The losses of other packages, where they are installed."""

import re
from functools import cache
from importlib import import_module

from torch import Tensor

from .case import Loss

# By the key of PEERS, who writes the gradient over the inputs. Liger does so with logits, in forward.
OVERWRITES = {"rows": ("Liger",)}


def liger() -> Loss:
    function = import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda input, target: function(input, target)


def quack() -> Loss:
    function = import_module("quack.cross_entropy").cross_entropy
    return lambda input, target: function(input, target, reduction="mean")


def flash_attention() -> Loss:
    criterion = import_module("flash_attn.losses.cross_entropy").CrossEntropyLoss()

    def loss(input: Tensor, target: Tensor) -> Tensor:
        return criterion(input, target)

    return loss


def linear_liger() -> Loss:
    function = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda input, head, target: function(input, head, target)


def linear_quack() -> Loss:
    """As its module chooses: chunks, or whole logits where a row of them is not aligned."""
    package = import_module("quack.linear_cross_entropy")

    def loss(input: Tensor, head: Tensor, target: Tensor) -> Tensor:
        if head.shape[0] % 8 == 0:
            return package.chunked_linear_cross_entropy(input, head, target)
        return package.linear_cross_entropy_func(input, head, None, target)

    return loss


def cut_cross_entropy() -> Loss:
    function = import_module("cut_cross_entropy").linear_cross_entropy
    return lambda input, head, target: function(input, head, target)


# By a case's ``peers``: cross-entropy of (N, C), and of hidden states and a head.
PEERS = {
    "rows": {"Liger": liger, "QuACK": quack, "flash-attn": flash_attention},
    "linear": {"Liger": linear_liger, "QuACK": linear_quack, "CCE": cut_cross_entropy},
}


@cache
def installed(kind: str) -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses that can be imported, and for the others why not."""
    found: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    for name, load in PEERS[kind].items() if kind else ():
        try:
            found[name] = load()
        except ModuleNotFoundError as error:
            missing[name] = f"not installed ({error.name})"
        except Exception as error:  # a package may raise anything at import
            missing[name] = describe(error)
    return found, missing


def describe(error: Exception) -> str:
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # without a terminal's colours
    first = (plain.strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].replace("|", "/")
