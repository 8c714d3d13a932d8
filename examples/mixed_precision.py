"""A training step in float16: autocast, and a GradScaler that keeps small gradients from vanishing.

The loss reads the float16 logits as they are and computes in float32. A mean over few rows has gradients near the
smallest float16; the scaler multiplies the loss, and the fused backward takes that factor as it takes any upstream
gradient.
"""

import sys

import torch
from torch import nn

import fusedloss


def main() -> int:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 100)).to(device)
    criterion = fusedloss.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=20)
    centers = torch.randn(100, 32, device=device)
    skipped, curve = 0, []
    for _ in range(100):
        labels = torch.randint(100, (256,), device=device)
        inputs = centers[labels] + 0.5 * torch.randn(256, 32, device=device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            logits = model(inputs)
            loss = criterion(logits, labels)
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)  # does nothing where a gradient overflowed, and halves the scale
        scaler.update()
        skipped += scaler.get_scale() < scale
        curve.append(loss.item())
    print(f"logits {logits.dtype}, loss {loss.dtype}; {fusedloss.explain(criterion, logits, labels)}")
    print(f"loss {curve[0]:.3f} to {curve[-1]:.3f}; {skipped} steps skipped, scale {scaler.get_scale():.0f}")
    return 0 if curve[-1] < curve[0] / 2 and skipped else 1


if __name__ == "__main__":
    sys.exit(main())
