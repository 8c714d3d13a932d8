"""A training step of a language model's head with 128,256 tokens, in a memory that its logits would not fit.

For 2,048 hidden states the logits are a gigabyte in float32, and plain PyTorch holds three tensors of that size. The
linear loss makes them in chunks, and the step stays within the budget.
"""

import resource
import sys
import time

import torch
from torch import nn

import fusedloss

TOKENS, FEATURES, VOCABULARY = 2048, 256, 128_256
BUDGET = 0.5e9  # bytes beside the weights: half of the logits


def resident_bytes() -> int:
    """The largest resident set so far; ru_maxrss counts kilobytes on Linux and bytes on macOS."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)


def main() -> int:
    torch.manual_seed(0)
    embedding = nn.Embedding(VOCABULARY, FEATURES)
    head = nn.Linear(FEATURES, VOCABULARY, bias=False)
    head.weight = embedding.weight  # tied
    criterion = fusedloss.LinearCrossEntropyLoss.from_linear(head, shift=1)
    ids = torch.randint(VOCABULARY, (4, TOKENS // 4))
    hidden = embedding(ids)  # a model would stand here
    print(fusedloss.explain(criterion, hidden, ids))
    before, start = resident_bytes(), time.perf_counter()
    loss = criterion(hidden, ids)
    loss.backward()
    seconds, used = time.perf_counter() - start, resident_bytes() - before
    logits = TOKENS * VOCABULARY * 4
    print(f"loss {loss.item():.3f}; the step took {seconds:.1f} s and {used / 1e9:.2f} GB", end="; ")
    print(f"the logits alone would take {logits / 1e9:.2f} GB, the budget is {BUDGET / 1e9:.2f} GB")
    return 0 if used <= BUDGET < logits else 1


if __name__ == "__main__":
    sys.exit(main())
