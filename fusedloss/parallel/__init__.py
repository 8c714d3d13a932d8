"""Losses over a sharded vocabulary: each rank of a torch.distributed group holds the logits of some classes.

The functions are those of :mod:`fusedloss.functional`, with the arguments ``group``, ``vocab_start`` and
``vocab_size``.

>>> import torch, torch.distributed as dist  # here a group of one rank
>>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
>>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, -100]), vocab_size=2)
tensor(0.1269)
>>> dist.destroy_process_group()

- ``_shards``: which classes a rank holds, and what it says of them to the others
- ``_local``: what a rank knows of the rows from its own classes
- ``_exchange``: what the ranks send each other
- ``_combine``: the numbers of all ranks as one, in one round or in two
- ``_row``: a row from what its parts are known by
- ``_backward``: the gradient, by the kernels
- ``_rows``: these as one function with its derivatives
- ``_work``: a linear loss over this rank's part of a head
- ``_upstream``: what keeps its gradients of half precision in range
- ``_linear``: its passes over chunks, with an exchange or a sum over the ranks in each
- ``_call``: what the losses share
- ``_pair``: a row of a divergence from what its parts are known by
- ``_pair_rows``: the divergences with their derivatives
- ``_placed``, ``_placed_divergence``, ``_placed_linear``, ``_placed_pointwise``: DTensors in the functions of
  :mod:`fusedloss.functional`
"""

from .cross_entropy import cross_entropy
from .divergence import kl_divergence
from .focal import focal_loss
from .linear import linear_cross_entropy
from .log_probs import log_probs

__all__ = ["cross_entropy", "focal_loss", "kl_divergence", "linear_cross_entropy", "log_probs"]
