"""Puts fused losses where others call losses by name, and takes them away again."""

import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from . import _models
from ._calls import Calls, Tally, between
from ._places import Place, places
from ._replacement import replacement

_lock = threading.RLock()


class _Standing:
    """A place that was changed, for one or more patches."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.original = getattr(place.owner, place.name)
        self.tally = Tally()
        self.ours = replacement(self.original, place.ours, self.tally)
        self.patches: set[Patch] = set()


_standing: dict[tuple[str, str], _Standing] = {}


class Report(NamedTuple):
    """What a patch did: printed, a line for each loss that was called."""

    calls: dict[str, Calls]  # of the places that were called
    modules: list[str]  # of a model
    copies: list[str]  # names that were imported before and still are the originals

    def __str__(self) -> str:
        lines = []
        for place, (fused, native, reasons) in self.calls.items():
            lines.append(f"{place}: {fused} fused, {native} native")
            lines += [f"    {count} x {why} (first at {site})" for why, (count, site) in reasons.items()]
        if self.modules:
            lines.append(f"modules of this package: {', '.join(self.modules)}")
        if self.copies:
            lines.append(f"imported before, and not fused: {', '.join(self.copies)} (rebind=True changes them)")
        return "\n".join(lines) or "no loss was called"


class Patch:
    """What :func:`patch` did, which ``undo()`` or the end of a ``with`` block takes back."""

    def __init__(self, wanted: list[Place], model: nn.Module | None, rebind: bool) -> None:
        self._swapped: list[_models.Swapped] = []
        self._held: list[tuple[_Standing, Calls]] = []  # with the calls before
        self._rebound: list[tuple[Any, str, _Standing]] = []
        self._last: Report | None = None
        try:
            with _lock:
                if model is not None:
                    self._swapped = _models.losses(model)
                    _models.swap(self._swapped)
                for place in wanted:
                    self.hold(place)
                if rebind:
                    self._rebound = list(self._copies())
                    for module, name, held in self._rebound:
                        setattr(module, name, held.ours)
        except BaseException:  # an interrupt too: the caller gets no handle to undo what was done
            self.undo()
            raise

    def hold(self, place: Place) -> None:
        key = (place.path, place.name)
        held = _standing.get(key)
        if held is None or getattr(place.owner, place.name) is not held.ours:
            held = _Standing(place)
        # First what undo() goes by.
        self._held.append((held, held.tally.calls()))
        held.patches.add(self)
        _standing[key] = held
        setattr(place.owner, place.name, held.ours)

    def _copies(self) -> Iterator[tuple[Any, str, _Standing]]:
        by_original = {id(held.original): held for held, _ in self._held}
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "torch").split(".")[0] in ("torch", "fusedloss"):
                continue
            for name, value in list(getattr(module, "__dict__", {}).items()):
                held = by_original.get(id(value))
                if held is not None and (module.__name__, name) != (held.place.path, held.place.name):
                    yield module, name, held

    def undo(self) -> None:
        """A second time it does nothing. What others have put in a place since then stays there, with a warning."""
        if self._last is not None:
            return
        with _lock:
            last = self.report()
            left = []
            for held, _ in self._held:
                held.patches.discard(self)
                owner, name = held.place.owner, held.place.name
                if held.patches:
                    continue
                if getattr(owner, name, None) is held.ours:
                    setattr(owner, name, held.original)
                elif getattr(owner, name, None) is not held.original:
                    left.append(str(held.place))
                if _standing.get((held.place.path, name)) is held:
                    del _standing[held.place.path, name]
            for module, name, held in self._rebound:
                if getattr(module, name, None) is held.ours:
                    setattr(module, name, held.original)
            left += _models.swap_back(self._swapped)
            self._last = last  # an undo that was interrupted may be called again
        if left:
            warnings.warn(f"{', '.join(left)}: no longer what patch() put there, and left as found", stacklevel=2)

    def report(self) -> Report:
        """What became of the calls so far, or until it was undone."""
        if self._last is not None:
            return self._last
        calls = {}
        for held, before in self._held:
            made = between(before, held.tally.calls())
            if made.fused or made.native:
                calls[str(held.place)] = made
        rebound = {(id(module), name) for module, name, _ in self._rebound}
        copies = [f"{m.__name__}.{name}" for m, name, _ in self._copies() if (id(m), name) not in rebound]
        return Report(calls, [name or "the model" for name, _, _ in self._swapped], copies)

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def patch(*packages: str, model: nn.Module | None = None, rebind: bool = False) -> Patch:
    """Makes the losses of other packages fused, in the whole process, until it is undone.

    Only what computes the same is changed, so that no result becomes another. Under torch.jit, torch.export and
    torch.func, for tensors of a type that overrides torch's functions and within a TorchFunctionMode the originals
    run. What is called by a name that was imported before (``from torch.nn.functional import cross_entropy``) is not
    reached: the report lists such names.

    Args:
        packages: ``"torch"``, the functions of torch.nn.functional, which the modules of torch.nn call;
            ``"torchvision"``, ``"transformers"`` and ``"timm"``, the losses that these packages define themselves.
            None, and no model, is ``"torch"``.
        model: whose losses become modules of this package in place: those that are of a class of torch.nn itself.
        rebind: changes names that were imported before, too.

    Returns:
        A handle and context manager, with ``undo()``, and ``report()`` on the calls so far. Patches may be nested, and
        undone in any order.

    Raises:
        ValueError: an unknown package, or a model that holds no loss of torch.nn. Nothing is changed then.
        ModuleNotFoundError: the package is not installed.

    >>> import torch
    >>> with patch() as patched:
    ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(2, 4), torch.tensor([0, 3]))
    >>> loss
    tensor(1.3863)
    >>> torch.nn.functional.cross_entropy.__module__
    'torch.nn.functional'
    """
    if not packages and model is None:
        packages = ("torch",)
    wanted = [place for package in packages for place in places(package)]
    return Patch(wanted, model, rebind)
