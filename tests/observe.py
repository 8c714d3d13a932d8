"""What runs and what is allocated while a loss is computed."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fusedloss import _captures

# Losses that torch.compile is handed as PyTorch's operators on a CPU, whatever their size.
ARITHMETIC = ("mse", "l1", "smooth_l1", "huber", "hinge_embedding", "margin_ranking")


def keeps_op(loss: str) -> bool:
    """Whether torch.compile keeps its op, where the tests make their tensors."""
    return loss not in ARITHMETIC or torch.get_default_device().type != "cpu"


class Recorder(TorchDispatchMode):
    """Writes down the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def compiled_with_ops(run: Callable[..., Any], **options: Any) -> tuple[Callable[..., Any], list[str]]:
    """The function under torch.compile in one graph, and a list to which each compilation adds the graph's ops."""
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    ops: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    return of_any_size(torch.compile(run, backend=aot_autograd(fw_compiler=backend), fullgraph=True, **options)), ops


def of_any_size(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Whose graphs hold the ops of a few elements too, as test_left_to_compiler.py alone does not want them."""

    def run(*arguments: Any, **options: Any) -> Any:
        with patch.object(_captures, "FEW_ELEMENTS", 0):
            return compiled(*arguments, **options)

    return run


def holds(ops: list[str], name: str) -> bool:
    """Whether a graph has that op of ours; forward comes with the gradient, or without."""
    return any(op.rpartition(".")[0] == f"fusedloss.{name}" for op in ops)


def _memory_events(run: Callable[[], Any]) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    return [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]


def bytes_allocated(run: Callable[[], Any]) -> int:
    """On the CPU, freed again or not."""
    return sum(max(0, event.nbytes()) for event in _memory_events(run))


def bytes_kept(run: Callable[[], Any]) -> int:
    return sum(event.nbytes() for event in _memory_events(run))


def peak_bytes(run: Callable[[], Any]) -> int:
    alive = peak = 0
    for event in sorted(_memory_events(run), key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
