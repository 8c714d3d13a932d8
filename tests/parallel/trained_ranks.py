"""Processes of a 2-d mesh: data parallelism over one dimension, by FSDP2 or as DDP averages, tensor over the other."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from processes import expect, main
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fusedloss.functional as L

FEATURES, CLASSES, BATCH, STEPS = 8, 13, 12, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).relu())


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, FEATURES, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        y[1] = y[BATCH // 2 + 3] = -100  # as many in each half of the batch, so that a mean of means is the mean
        made.append((x, y))
    return made


def new_model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def whole() -> dict[str, Tensor]:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        optimizer.step()
    return {name: each.detach() for name, each in model.named_parameters()}


def trained(data_parallel: str) -> None:
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    across = mesh["tensor"]
    model: nn.Module = new_model()
    plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, across, {"head": plan})
    if data_parallel == "fsdp2":
        fully_shard(model, mesh=mesh["data"])
    optimizer = torch.optim.SGD(model.parameters(), 0.5, foreach=False)
    half = BATCH // 2
    mine = slice(mesh["data"].get_local_rank() * half, (mesh["data"].get_local_rank() + 1) * half)
    for x, y in batches():
        optimizer.zero_grad()
        target = distribute_tensor(y[mine], across, [Replicate()])
        loss = L.cross_entropy(model(x[mine]), target, label_smoothing=0.1)
        loss.backward()
        if data_parallel == "averaged":  # what DDP does, which takes no DTensors
            for parameter in model.parameters():
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                dist.all_reduce(grad, group=mesh["data"].get_group())
                grad /= 2
        optimizer.step()
    for name, expected in whole().items():
        parameter = dict(model.named_parameters())[name].detach()
        got = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        off = (got - expected).abs().max().item()
        expect(off <= 1e-12, f"{data_parallel}, {name}: off by {off:.1e}")


def fsdp2() -> None:
    trained("fsdp2")


def averaged() -> None:
    trained("averaged")


if __name__ == "__main__":
    sys.exit(main(globals(), *sys.argv[1:]))
