"""A small transformer whose head is sharded over its vocabulary, trained beside the same one in one process.

torchrun --standalone --nproc-per-node 4 examples/sharded_head.py

It learns to predict the tokens of Python's standard library. torch's tensor parallelism cuts the head over the ranks.
The loss takes the sharded logits, and in a third run hidden states and the sharded head. All three have the same curve.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from corpus import token_ids
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fusedloss.functional as fused

VOCABULARY, FEATURES, LENGTH, BATCH = 2003, 64, 32, 16  # a vocabulary that no number of ranks divides
APART = 1e-4  # a rank's sums are rounded in another order


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, FEATURES)
        self.places = nn.Parameter(torch.randn(LENGTH, FEATURES))
        self.layer = nn.TransformerEncoderLayer(FEATURES, 4, 2 * FEATURES, dropout=0.0, batch_first=True)
        self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)

    def hidden(self, ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        made: Tensor = self.layer(self.embedding(ids) + self.places, src_mask=mask, is_causal=True)
        return made


Loss = Callable[[Model, Tensor, Tensor], Any]


def whole(model: Model, ids: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model.head(model.hidden(ids)).flatten(0, 1), target.flatten())


def of_logits(mesh: DeviceMesh) -> Loss:
    def loss(model: Model, ids: Tensor, target: Tensor) -> Any:
        logits = model.head(model.hidden(ids)).flatten(0, 1)  # a DTensor of placement Shard(1)
        return fused.cross_entropy(logits, distribute_tensor(target.flatten(), mesh, [Replicate()]))

    return loss


def of_hidden(mesh: DeviceMesh) -> Loss:
    def loss(model: Model, ids: Tensor, target: Tensor) -> Any:
        hidden = DTensor.from_local(model.hidden(ids), mesh, [Replicate()])
        return fused.linear_cross_entropy(hidden, model.head.weight, distribute_tensor(target, mesh, [Replicate()]))

    return loss


def train(loss_of: Loss, ids: Tensor, steps: int, mesh: DeviceMesh | None = None) -> list[float]:
    torch.manual_seed(0)
    model = Model()
    if mesh is not None:
        plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh, {"head": plan})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, foreach=False)  # of tensors and DTensors
    batches = torch.Generator().manual_seed(1)  # every rank trains on the same rows
    curve = []
    for _ in range(steps):
        starts = torch.randint(len(ids) - LENGTH - 1, (BATCH, 1), generator=batches)
        rows = ids[starts + torch.arange(LENGTH + 1)]
        loss = loss_of(model, rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.detach()
        curve.append(float(value if mesh is None else value.full_tensor()))
    return curve


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = torch.from_numpy(token_ids(VOCABULARY, 100_000))
    curves = {
        "one process": train(whole, ids, steps),
        "sharded logits": train(of_logits(mesh), ids, steps, mesh),
        "sharded head": train(of_hidden(mesh), ids, steps, mesh),
    }
    exact = curves["one process"]
    apart = max(abs(a - b) for curve in curves.values() for a, b in zip(curve, exact, strict=True))
    if dist.get_rank() == 0:
        for name, curve in curves.items():
            print(f"{name:15s} loss {curve[0]:.4f} to {curve[-1]:.4f} in {steps} steps")
        print(f"at most {apart:.1e} apart on {dist.get_world_size()} ranks")
    dist.destroy_process_group()
    return 0 if apart <= APART and exact[-1] < exact[0] else 1


if __name__ == "__main__":
    sys.exit(main())
