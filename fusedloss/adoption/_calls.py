"""What became of the calls of a loss: how many were fused, and why and from where the others were not."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch

from .. import _route


class Reason(NamedTuple):
    calls: int
    site: str  # of the first of them


class Calls(NamedTuple):
    fused: int
    native: int
    reasons: dict[str, Reason]


class Tally:
    """The calls of one loss so far."""

    def __init__(self) -> None:
        if _hear not in _route.heard_native:  # native calls cost no more before the first patch
            _route.heard_native.append(_hear)
        self.fused = 0
        self.reasons: dict[str, Reason] = {}
        self._reason_at: dict[tuple[str, int], str] = {}

    def add_native(self, why: Callable[[], str]) -> None:
        """Asks for the reason once for each line that calls: that takes as long as a small loss."""
        frame = _caller()
        line = (frame.f_code.co_filename, frame.f_lineno)
        if line not in self._reason_at:
            self._reason_at[line] = why()
        reason = self._reason_at[line]
        calls, site = self.reasons.get(reason, (0, f"{line[0]}:{line[1]}"))
        self.reasons[reason] = Reason(calls + 1, site)

    def calls(self) -> Calls:
        return Calls(self.fused, sum(each.calls for each in self.reasons.values()), dict(self.reasons))


def between(before: Calls, after: Calls) -> Calls:
    reasons = {}
    for why, (calls, site) in after.reasons.items():
        new = calls - before.reasons.get(why, (0, ""))[0]
        if new:
            reasons[why] = Reason(new, site)
    return Calls(after.fused - before.fused, after.native - before.native, reasons)


class _Current(threading.local):
    """Of the call in a place that a thread computes."""

    listens = False
    why: Callable[[], str] | None = None  # it is native


current = _Current()


def _hear(why: Callable[[], str]) -> None:
    if current.listens:
        current.why = why


_OURS = tuple(str(Path(module.__file__ or "").parent) + os.sep for module in (torch, sys.modules["fusedloss"]))


def _caller() -> FrameType:
    """The frame outside torch and this package."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame
