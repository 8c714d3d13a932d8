"""A loss of one's own: quantile regression, from one expression.

torch has no quantile loss. The expression below is compiled once, in some seconds, into the kernels that the built-in
losses run on, and kept; its slope is derived from it.
"""

import sys

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import fusedloss

QUANTILES = (0.1, 0.5, 0.9)


def main() -> int:
    torch.manual_seed(0)
    quantile_loss = fusedloss.pointwise_loss(
        "quantile", "t > x ? q * (t - x) : (1 - q) * (x - t)", params={"q": 0.5}
    )  # fmt: skip
    print(quantile_loss)
    features, values = load_diabetes(return_X_y=True)
    x, t = torch.tensor(features, dtype=torch.float32), torch.tensor(values, dtype=torch.float32)
    x, t = (x - x.mean(0)) / x.std(0), (t - t.mean()) / t.std()
    model = nn.Linear(10, len(QUANTILES))
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        predicted = model(x)
        loss = sum(quantile_loss(predicted[:, i], t, q=q) for i, q in enumerate(QUANTILES))
        loss.backward()
        optimizer.step()
    below = (t[:, None] < model(x)).float().mean(0)
    for q, share in zip(QUANTILES, below.tolist(), strict=True):
        print(f"predicted as the quantile {q}: {share:.1%} of the values lie below")
    return 0 if (below - torch.tensor(QUANTILES)).abs().max() < 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
