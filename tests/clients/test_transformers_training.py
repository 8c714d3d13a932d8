"""Models of transformers, trained by its Trainer: the same curve with the losses patched, and with the linear loss."""

from typing import Any

import pytest
import torch
from clients import needs
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss
from fusedloss.functional import linear_cross_entropy

pytestmark = [
    pytest.mark.deep(
        "trainings by other packages' trainers; contract/test_adoption.py covers patch() itself", minutes=0.5
    ),
    pytest.mark.filterwarnings("ignore"),
    needs_extension,
    on_cpu_alone("the Trainer is told to use the CPU"),
    needs("transformers", "accelerate"),
]
SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
# The model for classification calls torch's module.
PLACES = {
    "causal": "transformers.loss.loss_utils.fixed_cross_entropy",
    "classifier": "torch.nn.functional.cross_entropy",
}
SMOOTHER = "transformers.trainer_pt_utils.LabelSmoother.__call__"


def rows(classes: int | None) -> list[dict[str, Tensor]]:
    """Sequences whose labels are the tokens, some of them ignored, or one of the classes."""
    made = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(24):
        ids = torch.randint(3, 300, (12,), generator=made)
        labels = torch.where(torch.rand(12, generator=made) < 0.3, -100, ids)
        if classes:
            labels = torch.randint(classes, (), generator=made)
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def trained(kind: str, folder: Any, linear: bool = False, **arguments: Any) -> list[float]:
    """The loss of every call of the model, and of the evaluation after them."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model: Any
    if kind == "causal":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    else:
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, num_labels=5))
    curve = []

    class Trainer(transformers.Trainer):
        def compute_loss(self, *call: Any, **options: Any) -> Any:
            result = super().compute_loss(*call, **options)
            curve.append(float(result[0] if isinstance(result, tuple) else result))
            return result

    options: dict[str, Any] = {}
    if linear:
        from fusedloss.integrations.transformers import LinearLoss

        options["compute_loss_func"] = LinearLoss(
            model, label_smoothing=arguments.pop("label_smoothing_factor", 0.0), chunk_rows=10
        )
    told = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", seed=0,
        per_device_train_batch_size=4, num_train_epochs=2, learning_rate=1e-2, **arguments,
    )  # fmt: skip
    examples = rows(None if kind == "causal" else 5)
    trainer = Trainer(model=model, args=told, train_dataset=examples, eval_dataset=examples[:4], **options)
    trainer.train()
    trainer.evaluate()
    return curve


WAYS = {
    "plain": {},
    "smoothed": {"label_smoothing_factor": 0.1},
    "accumulated": {"gradient_accumulation_steps": 3},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_the_curve_is_the_same_when_patched(kind, way, tmp_path):
    expected = trained(kind, tmp_path, **WAYS[way])
    with fusedloss.patch("torch", "transformers") as patched:
        got = trained(kind, tmp_path, **WAYS[way])
    # Under autocast a last digit of float32 may round a gradient to another bfloat16.
    assert got == pytest.approx(expected, rel=2e-3 if way == "bfloat16" else 1e-5)
    assert max(expected) > 1.02 * min(expected)  # it learned
    report = patched.report()
    assert report.calls[SMOOTHER if way == "smoothed" else PLACES[kind]][:2] == (len(got), 0), report


def small(name: str, **more: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL, **more)).train()


@pytest.mark.parametrize(
    "name, more",
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"final_logit_softcapping": 0.5, "num_key_value_heads": 2, "head_dim": 16}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_the_linear_loss_makes_no_logits(name, more):
    from fusedloss.integrations.transformers import LinearLoss

    torch.manual_seed(0)
    model, ids = small(name, **more), torch.randint(3, 300, (2, 8))
    labels = torch.where(torch.rand(2, 8) < 0.3, -100, ids)
    for items in (None, 9, torch.tensor(9)):
        expected = model(ids, labels=labels, num_items_in_batch=items).loss
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        loss = LinearLoss(model, chunk_rows=5)
        outputs = model(ids)
        assert outputs.logits.shape == (2, 0, 300)
        got = loss(outputs, labels, num_items_in_batch=items)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, list(model.parameters())), gradients)
        model.eval()
        outputs = model(ids)
        assert outputs.logits.shape == (2, 8, 300)
        torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=items), expected)
        model.train()


def test_the_linear_loss_computes_under_the_autocast_of_the_forward():
    from fusedloss.integrations.transformers import LinearLoss

    torch.manual_seed(0)
    model, ids = small("Llama"), torch.randint(3, 300, (2, 8))
    loss = LinearLoss(model)
    with torch.autocast("cpu", torch.bfloat16):  # the Trainer's ends with the model's forward
        outputs = model(ids)
        hidden, head = outputs.hidden_states[-1], model.lm_head.weight
        expected = linear_cross_entropy(hidden, head, ids, shift=1)
    assert torch.equal(loss(outputs, ids), expected)
    assert not torch.equal(linear_cross_entropy(hidden, head, ids, shift=1), expected)
    in_float32 = model(ids)
    hidden = in_float32.hidden_states[-1]
    assert torch.equal(loss(in_float32, ids), linear_cross_entropy(hidden, head, ids, shift=1))


def test_the_linear_loss_refuses_what_it_cannot_compute():
    import transformers

    from fusedloss.integrations.transformers import LinearLoss

    more = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "num_key_value_heads": 2,
        "lm_head_multiplier": 0.5,
    }
    with pytest.raises(
        ValueError, match="expected logits that are the head's, scaled or capped, got FalconH1ForCausalLM"
    ):
        LinearLoss(small("FalconH1", **more))
    t5 = transformers.T5Config(vocab_size=300, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="expected a model whose forward takes logits_to_keep, got T5ForCond"):
        LinearLoss(transformers.T5ForConditionalGeneration(t5))
    adapted = small("Llama")
    adapted.lm_head = torch.nn.Sequential(adapted.lm_head)
    with pytest.raises(ValueError, match="expected a head that is an nn.Linear, got Sequential"):
        LinearLoss(adapted)
    routed = small("Mixtral", num_local_experts=2, num_key_value_heads=2, output_router_logits=True)
    loss, ids = LinearLoss(routed), torch.full((1, 4), 5)
    with pytest.raises(ValueError, match="without an auxiliary loss"):
        loss(routed(ids), ids)
    with pytest.raises(ValueError, match="expected labels, got None"):
        loss(routed(ids), None)


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_the_same_with_the_linear_loss(way, tmp_path):
    expected = trained("causal", tmp_path, **WAYS[way])
    got = trained("causal", tmp_path, linear=True, **WAYS[way])
    # Under autocast the head's gradient is a sum over chunks of rounded products.
    assert got == pytest.approx(expected, rel=2e-2 if way == "bfloat16" else 1e-5)
