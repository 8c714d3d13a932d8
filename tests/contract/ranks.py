"""A process of two: trains with DistributedDataParallel and fully_shard, calls losses of DTensors, forks.

python ranks.py RANK FOLDER    both processes meet in the folder; what differs from torch.nn ends the process
"""

import multiprocessing
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fusedloss
import fusedloss.functional as L

CLASSES = 8


def of_classes() -> Tensor:
    return torch.linspace(0.5, 2, CLASSES)


LOSSES: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "cross-entropy": ("indices", lambda of: of.CrossEntropyLoss(of_classes(), label_smoothing=0.1)),
    "cross-entropy, mean": ("indices", lambda of: of.CrossEntropyLoss()),
    "cross-entropy, none": ("indices", lambda of: of.CrossEntropyLoss(reduction="none")),
    "probabilities": ("probabilities", lambda of: of.CrossEntropyLoss()),
    "nll": ("indices", lambda of: of.NLLLoss()),
    "mse": ("numbers", lambda of: of.MSELoss()),
    "l1": ("numbers", lambda of: of.L1Loss(reduction="sum")),
    "smooth l1": ("numbers", lambda of: of.SmoothL1Loss()),
    "huber": ("numbers", lambda of: of.HuberLoss(reduction="none")),
    "logits": ("numbers", lambda of: of.BCEWithLogitsLoss(pos_weight=of_classes())),
}


def data(kind: str, seed: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, t = (make(rows, CLASSES, generator=generator) for make in (torch.randn, torch.rand))
    if kind == "indices":
        t = torch.randint(CLASSES, (rows,), generator=generator)
    return x, t.softmax(1) if kind == "probabilities" else t


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Model(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES))
        self.loss = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.layers(input), target)


def trained(model: Model, wrapped: Callable[..., Tensor], kind: str) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        value = wrapped(*data(kind, dist.get_rank() + 2 * step))
        value.sum().backward()
        optimizer.step()
    return [value.detach(), *[whole(each.detach()) for each in model.parameters()]]


def data_parallel(kind: str, loss: nn.Module) -> list[Tensor]:
    model = Model(loss)
    return trained(model, nn.parallel.DistributedDataParallel(model), kind)


def compiled_data_parallel(kind: str, loss: nn.Module) -> list[Tensor]:
    model = Model(loss)
    torch._dynamo.reset()
    wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
    with torch._functorch.config.patch(cse=False):  # which would import Inductor for a backend that does without
        return trained(model, wrapped, kind)


def sharded(kind: str, loss: nn.Module) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = Model(loss)
    fully_shard(model.layers[0])
    return trained(model, fully_shard(model), kind)


class Tied(nn.Module):
    """A language model of one layer, whose head is its embedding, with the loss inside."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, CLASSES)
        self.layer = nn.Linear(CLASSES, CLASSES)
        head = nn.Linear(CLASSES, CLASSES, bias=False)
        head.weight = self.embedding.weight
        linear = fusedloss.LinearCrossEntropyLoss.from_linear(head, chunk_rows=3)
        self.loss = linear if of is fusedloss else nn.Sequential(head)
        self.linear = of is fusedloss

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        hidden = self.layer(self.embedding(tokens))
        return self.loss(hidden, target) if self.linear else nn.functional.cross_entropy(self.loss(hidden), target)


def tied_head(wrap: Callable[[Tied], Callable[..., Tensor]]) -> None:
    """The linear loss of a tied head trains as torch's head and loss."""
    runs = []
    for of in (nn, fusedloss):
        model = Tied(of)
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            _, target = data("indices", dist.get_rank() + 2 * step, 8)
            value = wrapped(target.roll(1), target)
            value.backward()
            optimizer.step()
        named = dict(model.named_parameters())
        runs.append([value.detach(), *[whole(named[name].detach()) for name in ("embedding.weight", "layer.weight")]])
    torch.testing.assert_close(runs[1], runs[0], msg=lambda text: f"a tied head: {text}")


def of_dtensors(of_input: Any, of_target: Any, parallel: bool = False) -> Callable[[str, nn.Module], list[Tensor]]:
    def run(kind: str, loss: nn.Module) -> list[Tensor]:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor
        from torch.distributed.tensor.parallel import loss_parallel

        mesh = init_device_mesh("cpu", (2,))
        for name, buffer in list(loss.named_buffers()):
            setattr(loss, name, distribute_tensor(buffer, mesh))
        x, t = (distribute_tensor(each, mesh, place) for each, place in zip(data(kind, 5), (of_input, of_target)))  # noqa: B905
        x.requires_grad_()
        if not parallel:
            value = loss(x, t)
            whole(value.sum()).backward()
        else:
            with loss_parallel():
                value = loss(x, t)
                value.backward()
        return [whole(value.detach()), whole(x.grad)]

    return run


def outcome(run: Callable[[], list[Tensor]]) -> list[Tensor] | str:
    try:
        return run()
    except Exception as error:
        return repr(error)


def check(name: str, run: Callable[[str, nn.Module], list[Tensor]], losses: list[str]) -> None:
    """The numbers of torch.nn, or its error."""
    for loss in losses:
        kind, make = LOSSES[loss]
        torchs, ours = (outcome(lambda of=of, kind=kind, make=make: run(kind, make(of))) for of in (nn, fusedloss))
        print(f"{name}, {loss}: {torchs if isinstance(torchs, str) else 'trained'}")
        torch.testing.assert_close(ours, torchs, msg=lambda text, loss=loss: f"{name}, {loss}: {text}") if isinstance(
            torchs, list
        ) else expect(ours == torchs, f"{name}, {loss}: expected {torchs} as from torch, got {ours}")


def expect(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


# ---- processes


def value_and_slope(rows: int) -> tuple[float, float]:
    x, t = data("indices", 3, rows)
    x.requires_grad_()
    value = L.cross_entropy(x, t)
    value.backward()
    return value.item(), x.grad.abs().sum().item()


def in_a_fork(queue: Any) -> None:
    small = value_and_slope(16)
    torch.set_num_threads(1)  # or libgomp waits for threads that the child does not have, in torch's own ops too
    queue.put((small, value_and_slope(100_000)))


def forks() -> None:
    """After work of several threads, small work in a child and, with one thread, large work."""
    torch.set_num_threads(2)
    expected = value_and_slope(16), value_and_slope(100_000)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_a_fork, args=(queue,))
    child.start()
    try:
        got = queue.get(timeout=60)
    finally:
        child.kill()
    expect(got == expected, f"in a fork: expected {expected}, got {got}")
    torch.set_num_threads(1)


def leave(folder: Path) -> None:
    """Modules and an exported program, for the other process."""
    modules = [make(fusedloss) for _, make in LOSSES.values()]
    modules += [fusedloss.FocalLoss(of_classes()), fusedloss.SigmoidFocalLoss(weight=of_classes())]
    (folder / "modules").write_bytes(pickle.dumps(modules))
    model = Model(fusedloss.CrossEntropyLoss(of_classes()))
    x, t = data("indices", 7)
    program = torch.export.export(model, (x, t))
    expect("fusedloss.cross_entropy" in str(program.graph), "expected the fused op in the exported program")
    torch.export.save(program, folder / "program.pt2")
    torch.save(model(x, t), folder / "value")


def take(folder: Path) -> None:
    for module, (kind, make) in zip(pickle.loads((folder / "modules").read_bytes()), LOSSES.values(), strict=False):
        torch.testing.assert_close(module(*data(kind, 9)), make(fusedloss)(*data(kind, 9)), rtol=0, atol=0)
    program = torch.export.load(folder / "program.pt2")
    value = program.module()(*data("indices", 7))
    torch.testing.assert_close(value, torch.load(folder / "value"))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if rank == 0:
        forks()
        leave(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        take(folder)
    from torch.distributed.tensor import Replicate, Shard

    check("DistributedDataParallel", data_parallel, list(LOSSES))
    check("fully_shard", sharded, list(LOSSES))
    from torch.distributed.fsdp import fully_shard

    tied_head(nn.parallel.DistributedDataParallel)
    tied_head(fully_shard)
    rows, columns, all_of_it = [Shard(0)], [Shard(1)], [Replicate()]
    by_rows = [name for name, (kind, _) in LOSSES.items() if kind == "indices"]
    # torch's mean by weight is the mean of the ranks' means, and its means of elements have wrong gradients; parallel/
    # compares ours with the whole ones.
    check(
        "rows of DTensors",
        of_dtensors(rows, rows),
        [*(each for each in by_rows if each != "cross-entropy"), "probabilities"],
    )
    check("columns of DTensors", of_dtensors(columns, all_of_it), by_rows)
    check("compiled DistributedDataParallel", compiled_data_parallel, ["cross-entropy"])
    check("loss_parallel", of_dtensors(columns, all_of_it, parallel=True), ["cross-entropy, mean"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
