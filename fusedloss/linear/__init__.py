"""Linear losses: from hidden states and a head to loss and gradients, without the logits.

A softmax loss of ``logits = logit_scale * (input @ linear_weight.T + linear_bias)`` is computed in chunks of rows. Each
chunk's logits are made in one buffer by torch's matrix product, turned into their gradient there by the loss's kernel,
and multiplied into the gradients of the input and the head. Whatever loss :mod:`fusedloss._route` declares in the
softmax family has this form.

- ``_call``: what the ops are given
- ``_chunks``: how many rows a chunk has
- ``_rows``: which rows count, which are right, and what a mean divides by
- ``_kept``: what forward keeps of them for backward
- ``_scale``: what all gradients are multiplied by, and what keeps those of float16 in range
- ``_products``: the matrix products with the gradient of the logits
- ``_gradients``: their sums over chunks
- ``_passes``: forward, forward with gradients, backward
- ``_by_classes``: backward over blocks of classes
- ``_ops``: these three as ops of torch, with their derivatives
- ``_route``: when a call takes the ops
"""

from ._route import Head as Head
from ._route import Options as Options
from ._route import softmax as softmax
from ._rows import rows_kept as rows_kept
