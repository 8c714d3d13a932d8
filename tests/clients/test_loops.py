"""Lightning, a training loop as in torch's examples, and torch.nn.parallel: the same curve with the losses patched."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from clients import needs
from compiler import ROOT
from marks import needs_extension, on_cpu_alone
from torch import Tensor, nn

import fusedloss

pytestmark = [
    pytest.mark.deep(
        "trainings by other packages' trainers; contract/test_adoption.py covers patch() itself", minutes=0.3
    ),
    pytest.mark.filterwarnings("ignore"),
    needs_extension,
    on_cpu_alone("the trainings are the CPU's"),
]
PLACE = "torch.nn.functional.cross_entropy"


@needs("lightning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision, tmp_path):
    import lightning

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 5))
            self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
            self.curve: list[float] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            x, y = batch
            loss = self.criterion(self.body(x), y)
            self.curve.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    def curve() -> list[float]:
        lightning.seed_everything(0)
        x = torch.randn(64, 8)
        batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.argmax(1) % 5), 16)
        model = Classifier()
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=3, precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, batches)
        return model.curve

    expected = curve()
    with fusedloss.patch() as patched:
        got = curve()
    assert got == pytest.approx(expected, rel=1e-5 if precision == "32-true" else 2e-3) and got[-1] < 0.95 * got[0]
    assert patched.report().calls[PLACE][:2] == (12, 0)


LOOP = """
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim

def main(wrapped=lambda net: net, rank=0, ranks=1):
    torch.manual_seed(0)
    images = torch.rand(96, 1, 8, 8)
    labels = (images.mean((1, 2, 3)) * 200).long() % 4
    images, labels = images[rank::ranks], labels[rank::ranks]
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4), nn.LogSoftmax(dim=1))
    net = wrapped(net)
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    curve = []
    for epoch in range(4):
        for data, target in zip(images.split(16), labels.split(16)):
            optimizer.zero_grad()
            output = net(data)
            loss = F.nll_loss(output, target)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
    return curve
"""
IN_TWO_PROCESSES = """
import fusedloss
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
expected = main(nn.parallel.DistributedDataParallel, rank, 2)
with fusedloss.patch() as patched:
    got = main(nn.parallel.DistributedDataParallel, rank, 2)
torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
assert got != main(rank=rank, ranks=2)  # the gradients were averaged
print(f"rank {rank}: {patched.report()}\\n", end="")  # one write: the other rank's would come between two
torch.distributed.destroy_process_group()
"""
NLL = "torch.nn.functional.nll_loss"


@pytest.mark.parametrize("wrapped", [lambda net: net, nn.parallel.DataParallel], ids=["alone", "DataParallel"])
def test_a_loop_as_it_is(wrapped):
    names: dict[str, Any] = {}
    exec(LOOP, names)
    expected = names["main"](wrapped)
    with fusedloss.patch() as patched:
        got = names["main"](wrapped)
    assert got == pytest.approx(expected, rel=1e-5) and len(got) == 24
    assert patched.report().calls[NLL][:2] == (24, 0)


def test_distributed_data_parallel(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(LOOP + IN_TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {rank}: {NLL}: 12 fused, 0 native" for rank in range(2)]
