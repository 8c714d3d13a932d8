"""The cross-entropies of other packages, where they are installed."""

from functools import cache
from importlib import import_module

from torch import Tensor

from .case import Loss

# Liger writes the gradient over the logits, in forward.
OVERWRITES = ("Liger",)


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


PEERS = {"Liger": liger, "QuACK": quack, "flash-attn": flash_attention}


@cache
def installed() -> tuple[dict[str, Loss], dict[str, str]]:
    """The losses that can be imported, and for the others why not."""
    found: dict[str, Loss] = {}
    missing: dict[str, str] = {}
    for name, load in PEERS.items():
        try:
            found[name] = load()
        except ModuleNotFoundError as error:
            missing[name] = f"not installed ({error.name})"
        except Exception as error:  # a package may raise anything at import
            missing[name] = describe(error)
    return found, missing


def describe(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].replace("|", "/")
