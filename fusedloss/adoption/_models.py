"""The losses of one model: each becomes a module of this package in place."""

from torch import nn

from .. import modules


def _ours() -> dict[type[nn.Module], type[nn.Module]]:
    """By torch's class. A class of a user's own may have changed forward, and stays."""
    found = {}
    for each in vars(modules).values():
        if isinstance(each, type) and issubclass(each, nn.Module) and each.__module__.startswith("fusedloss."):
            base = getattr(nn, each.__name__, None)
            if base is not None and issubclass(each, base):
                found[base] = each
    return found


Swapped = tuple[str, nn.Module, type[nn.Module]]  # a loss by its name in the model, with the class that it had


def losses(model: nn.Module) -> list[Swapped]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    ours = _ours()
    found = [(name, module, type(module)) for name, module in model.named_modules() if type(module) in ours]
    if not found:
        raise ValueError(f"expected a model that holds a loss of torch.nn, got {type(model).__name__}")
    return found


def swap(found: list[Swapped]) -> None:
    ours = _ours()
    for _, module, was in found:
        module.__class__ = ours[was]


def swap_back(swapped: list[Swapped]) -> list[str]:
    """The names of those that are neither what :func:`swap` made of them nor what they were, and stay."""
    ours, left = _ours(), []
    for name, module, was in swapped:
        if type(module) is ours[was]:
            module.__class__ = was
        elif type(module) is not was:
            left.append(name)
    return left
