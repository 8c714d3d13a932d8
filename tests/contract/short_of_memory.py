"""A process in which each large allocation of a call fails in turn; nothing may be left half-written.

LD_PRELOAD=<failing_malloc.cpp, compiled> python short_of_memory.py [words of the names of calls]

Inputs, their versions and gradients must be as before the call that failed; the same backward, or where forward failed
the same step, must then give what it gives where memory suffices.
"""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from compare import upstreams as _upstreams
from distillation_calls import DIRECTIONS, pair
from linear_calls import ROUTES, drawn, indices, operands
from linear_calls import call as call_linear
from linear_distillation_calls import NAMES, TEACHERS
from linear_distillation_calls import ROUTES as ROUTES_OF_PAIR
from linear_distillation_calls import call as call_of_pair
from linear_distillation_calls import operands as operands_of_pair
from losses import ONE_OF_EACH, Loss
from row_sums_calls import CALLS, of
from row_sums_calls import made as made_rows
from torch import Tensor

import fusedloss.functional as L

memory = ctypes.CDLL(None)
# Bytes: tensors and the kernels' scratch memory, but not what the C library keeps of a thread, without which it aborts.
LARGE = 33_000
ROWS, CLASSES = 20_000, 9  # several chunks of several threads, and losses and statistics above that size


class Call(NamedTuple):
    leaves: list[Tensor]
    loss: Callable[..., Any]  # a function of them
    overwrites: bool = False  # ... or of a product that it may overwrite


def calls() -> dict[str, Call]:
    made: dict[str, Call] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for loss in ONE_OF_EACH:
            x, target = loss.data((ROWS, CLASSES), dtype)
            for layout, each in (("dense", x), ("by columns", x.T.contiguous().T)):
                for reduction in ("mean", "none"):
                    made[f"{loss.name}, {dtype}, {layout}, {reduction}"] = Call([each], _of(loss, target, reduction))
        for direction in DIRECTIONS:
            student, teacher = pair((300, 2100), dtype)
            made[f"divergence {direction}, {dtype}"] = Call([student], _divergence(teacher, direction))
        for layout, strides in (("dense", (CLASSES, 1)), ("by columns", (1, ROWS)), ("padded", (2 * CLASSES, 2))):
            for forward in (False, True):
                x = torch.empty_strided((ROWS, CLASSES), strides, dtype=dtype).copy_(drawn(ROWS, CLASSES))
                made[f"in place, {dtype}, {layout}, grad_in_forward={forward}"] = Call([x], _in_place(forward), True)
    for name in CALLS:
        rows, options = made_rows(name, (ROWS,), CLASSES, torch.float32)
        made[name] = Call(rows, of(L, name, options))
    leaves, target = operands((400,), features=24, classes=300)[:2], indices((400,), classes=300)
    for route, options in ROUTES.items():
        made[f"linear, {route}"] = Call(list(leaves), _linear(target, options))
    given = operands_of_pair((400,), classes=300, features=24)
    frozen = {name: given[name] for name in TEACHERS}
    for name, options in ROUTES_OF_PAIR.items():
        run = lambda *student, o=options: call_of_pair({**dict(zip(NAMES, student, strict=False)), **frozen}, 100, **o)  # noqa: E731
        made[f"linear divergence, {name}"] = Call([given[each] for each in NAMES], run)
    return made


def _of(loss: Loss, target: Tensor, reduction: str) -> Callable[..., Any]:
    return lambda x: loss.fused(x, target, reduction)


def _divergence(teacher: Tensor, direction: str) -> Callable[..., Any]:
    return lambda student: L.kl_divergence(student, teacher, direction=direction)


def _in_place(grad_in_forward: bool) -> Callable[..., Any]:
    target = indices((ROWS,), classes=CLASSES)
    weight = torch.linspace(0.5, 2, CLASSES)
    options = {"inplace": True, "grad_in_forward": grad_in_forward}
    return lambda x: L.cross_entropy(x, target, weight.to(x.dtype), **options)


def _linear(target: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    return lambda *leaves: call_linear(leaves, target, chunk_rows=100, **options)


def step(call: Call, failing: int, upstreams: list[Tensor]) -> tuple[list[Tensor], bool]:
    """The results and the gradients, and whether the allocation of that number failed on the way; 0: none is to."""
    leaves = [each.detach().clone(memory_format=torch.preserve_format).requires_grad_() for each in call.leaves]
    for leaf in leaves:
        leaf.grad = torch.ones_like(leaf)
    inputs = [leaf * 1 for leaf in leaves] if call.overwrites else leaves
    before = [(each.detach().clone(), each._version) for each in inputs]
    results: list[Tensor] = []

    def run() -> None:
        if not results:
            made = call.loss(*inputs)
            results.extend([made] if isinstance(made, Tensor) else made)
        torch.autograd.backward(results, upstreams or _upstreams(*results))

    memory.fail_allocation(failing, LARGE)
    try:
        run()
        raised = None
    except (RuntimeError, MemoryError) as error:
        raised = error.with_traceback(None)
    failed = memory.allocations_left() == 0 and failing > 0
    if raised is not None:
        assert failed, f"raised without need: {raised}"
        assert all(torch.equal(leaf.grad, torch.ones_like(leaf)) for leaf in leaves), f"half a gradient: {raised}"
        changed = [each._version != version for each, (_, version) in zip(inputs, before, strict=True)]
        if any(changed):
            assert call.overwrites and results, f"an input was overwritten: {raised}"
            return [], True  # the gradient was there, and what came before the logits failed
        assert all(
            torch.equal(each, old) for each, (old, _) in zip(inputs, before, strict=True)
        ), f"an input was written, and counts as unchanged: {raised}"
        run()
    return [each.detach() for each in results] + [leaf.grad for leaf in leaves], failed


def in_a_new_thread(*given: Any) -> Any:
    """Whose scratch memory, and its workers', is not there yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(step, *given).result()


def main(words: list[str]) -> None:
    memory.fail_allocation.argtypes = [ctypes.c_long, ctypes.c_size_t]
    torch.set_num_threads(2)
    failures = 0
    for name, call in calls().items():
        if not all(word in name for word in words):
            continue
        expected, _ = step(call, 0, [])
        upstreams = _upstreams(*expected[: len(expected) - len(call.leaves)])
        failing, failed = 0, True
        while failed:
            failing += 1
            try:
                got, failed = in_a_new_thread(call, failing, upstreams)
            except AssertionError as error:
                sys.exit(f"{name}: where allocation {failing} fails, {error}")
            for one, other in zip(got, expected, strict=True) if got else []:
                if (one - other).norm() > 1e-5 * other.norm():  # products share their sums among threads
                    sys.exit(f"{name}: after allocation {failing} failed, other numbers")
        failures += failing - 1
    print(failures)


if __name__ == "__main__":
    main(sys.argv[1:])
