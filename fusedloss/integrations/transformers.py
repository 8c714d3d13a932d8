"""The linear loss in the Trainer of transformers: a causal language model is trained, and its logits are never made."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from .._linear_module import LinearCrossEntropyLoss


class LinearLoss:
    """A ``compute_loss_func``: ``Trainer(model, compute_loss_func=LinearLoss(model), ...)``.

    While the model trains and is given no labels, as the Trainer does beside a ``compute_loss_func``, its forward gives
    hidden states, and logits of no rows. :func:`fusedloss.functional.linear_cross_entropy` takes those states and the
    head, with the scale and the softcap of the model's configuration, under the autocast that the head would run under.
    A model that evaluates gives logits as before, and the loss is taken of them.

    Args:
        model: a causal language model whose forward takes ``logits_to_keep`` and whose head is an ``nn.Linear``. It
            runs once, over two tokens without gradients, to see that its logits are what this class takes them for.
        label_smoothing: as the Trainer's ``label_smoothing_factor``, which does nothing beside a
            ``compute_loss_func``.
        ignore_index: labels that do not count.
        options: further keywords of :class:`fusedloss.LinearCrossEntropyLoss`, such as ``chunk_rows``.

    Raises:
        ValueError: the model's logits cannot be made from its last hidden states and its head.
    """

    def __init__(self, model: Any, *, label_smoothing: float = 0.0, ignore_index: int = -100, **options: Any) -> None:
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ValueError(f"expected a head that is an nn.Linear, got {type(head).__name__}")
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"expected a model whose forward takes logits_to_keep, got {type(model).__name__}")
        config = model.config.get_text_config()
        self.scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self._autocast: torch.dtype | None = None
        self._check(model, head)
        self._loss = LinearCrossEntropyLoss.from_linear(
            head, shift=1, logit_scale=self.scale, softcap=self.softcap, ignore_index=ignore_index,
            label_smoothing=label_smoothing, **options,
        )  # fmt: skip
        model.register_forward_pre_hook(self._keep_no_logits, with_kwargs=True)
        head.register_forward_pre_hook(self._see_autocast)

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if labels is None:
            raise ValueError("expected labels, got None")
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError("expected outputs without an auxiliary loss, which transformers adds only beside labels")
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(labels.device)
        if outputs.logits.shape[:-1] == labels.shape:
            return self._of_logits(outputs.logits, labels, num_items_in_batch)
        device = labels.device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            loss: Tensor = self._loss(outputs.hidden_states[-1], labels, normalizer=num_items_in_batch)
        return loss

    def _of_logits(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        labels = nn.functional.pad(labels[..., 1:], (0, 1), value=self.ignore_index)
        loss = functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index,
            reduction="mean" if items is None else "sum", label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return loss if items is None else loss / items

    def _keep_no_logits(self, model: nn.Module, arguments: Any, options: dict[str, Any]) -> Any:
        if not model.training or not torch.is_grad_enabled() or options.get("labels") is not None:
            return None
        device = self._loss.linear.weight.device
        none = torch.empty(0, dtype=torch.int64, device=device)
        return arguments, {**options, "logits_to_keep": none, "output_hidden_states": True, "return_dict": True}

    def _see_autocast(self, head: nn.Module, arguments: Any) -> None:
        """The Trainer turns it on within the model's forward, and calls this outside of it."""
        device = self._loss.linear.weight.device.type
        self._autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def _check(self, model: Any, head: nn.Linear) -> None:
        given: list[Tensor] = []
        made: list[Tensor] = []

        def other_logits(_: nn.Module, arguments: Any, logits: Tensor) -> Tensor:
            given.append(arguments[0])
            made.append(10 * torch.randn_like(logits))  # large enough to show a cap
            return made[0]

        hook = head.register_forward_hook(other_logits)
        try:
            with torch.no_grad(), torch.random.fork_rng():
                ids = torch.full((1, 2), head.out_features // 2, device=head.weight.device)
                outputs = model(input_ids=ids, output_hidden_states=True, return_dict=True, use_cache=False)
        finally:
            hook.remove()
        name = type(model).__name__
        if not torch.equal(outputs.hidden_states[-1], given[0]):
            raise ValueError(f"expected a head that is given the last hidden states, got {name}, which changes them")
        expected = made[0].float() * self.scale
        if self.softcap is not None:
            expected = self.softcap * torch.tanh(expected / self.softcap)
        tolerance = 1e-5 if made[0].dtype == torch.float32 else 2e-2
        if not torch.allclose(outputs.logits.float(), expected, rtol=tolerance, atol=tolerance):
            raise ValueError(f"expected logits that are the head's, scaled or capped, got {name}, which changes them")
