"""patch("transformers") and patch("timm"): the losses that these packages define give what they gave."""

import pytest
import torch
from clients import losses_of_timm, needs, same_when_patched, value_and_grad
from marks import needs_extension, on_cpu_alone
from torch import Tensor

import fusedloss

pytestmark = [
    pytest.mark.deep("losses of other packages, patched; contract/test_adoption.py covers patch() itself", minutes=0.2),
    needs_extension,
    on_cpu_alone("the operands are the CPU's"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
X = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), device="cpu")
T = torch.tensor([0, 6, 3, -100, 2, 2, 5, 1, 0, 4, -100, 6], device="cpu")
SOFT = X.flip(0).softmax(1)
HARD = (X.flip(1) > 0.3).float()
BINARY = [{"smoothing": 0.0}, {}, *({"target_threshold": at} for at in (0.01, 0.2, 0.95)), {"smooth_dense": True}]
LOSSES = "transformers.loss.loss_utils"


@needs("transformers")
class TestTransformers:
    @pytest.mark.parametrize("items", [None, 9, torch.tensor(9)], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_language_models(self, dtype, items):
        from transformers.loss.loss_utils import LOSS_MAPPING

        x = X.view(2, 6, 7).to(dtype)
        for name in ("ForCausalLM", "ForMaskedLM"):
            call = lambda logits: LOSS_MAPPING[name](  # noqa: E731, B023
                logits, T.view(2, 6), vocab_size=7, num_items_in_batch=items
            )
            same_when_patched("transformers", f"{LOSSES}.fixed_cross_entropy", call, x)

    @pytest.mark.parametrize("items", [None, 9, torch.tensor(9)], ids=str)
    @pytest.mark.parametrize("shift", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_label_smoothing(self, dtype, shift, items):
        from transformers.trainer_pt_utils import LabelSmoother

        labels = T.view(2, 6).clone()
        labels[0, 2] = -7  # which counts as class 0
        call = lambda logits: LabelSmoother(0.2)(  # noqa: E731
            {"logits": logits}, labels, shift_labels=shift, num_items_in_batch=items
        )
        x = X.view(2, 6, 7).to(dtype)
        same_when_patched("transformers", "transformers.trainer_pt_utils.LabelSmoother.__call__", call, x)

    def test_what_the_original_alone_serves(self):
        from transformers.trainer_pt_utils import LabelSmoother

        place = "transformers.trainer_pt_utils.LabelSmoother.__call__"
        same_when_patched("transformers", place, lambda x: LabelSmoother()((x,), T[:, None]), X, "native")
        same_when_patched("transformers", place, lambda x: LabelSmoother(1.5)((x,), T), X, "native")
        with fusedloss.patch("transformers"), pytest.raises(RuntimeError, match="index 9 is out of bounds"):
            LabelSmoother()((X,), T + 3)

    @pytest.mark.parametrize("module", ["loss_for_object_detection", "loss_rt_detr", "loss_grounding_dino"])
    def test_focal_losses_of_detectors(self, module):
        import importlib

        losses = importlib.import_module(f"transformers.loss.{module}")
        x, place = X.view(2, 6, 7), f"transformers.loss.{module}.sigmoid_focal_loss"
        for options in ({}, {"alpha": -1}, {"alpha": 0.6, "gamma": 1.5}):
            call = lambda x: losses.sigmoid_focal_loss(x, HARD.view_as(x), 5, **options)  # noqa: E731, B023
            same_when_patched("transformers", place, call, x)
        same_when_patched(
            "transformers", place, lambda x: losses.sigmoid_focal_loss(x, HARD.view_as(x), 5, gamma=-1.0), x, "native"
        )

    def test_the_loss_of_causal_models_stays_the_function_that_the_trainer_knows(self):
        from transformers.loss import loss_utils

        original = loss_utils.ForCausalLMLoss
        with fusedloss.patch("transformers"):
            assert loss_utils.LOSS_MAPPING["ForCausalLM"] is loss_utils.ForCausalLMLoss is original


@needs("timm")
class TestTimm:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cross_entropies(self, dtype):
        timm = losses_of_timm()
        x, target = X.to(dtype), T.clamp(min=0)
        place = "timm.loss.cross_entropy.{}.forward"
        for smoothing in (0.0, 0.1):
            loss = timm.LabelSmoothingCrossEntropy(smoothing)
            same_when_patched("timm", place.format("LabelSmoothingCrossEntropy"), lambda x: loss(x, target), x)  # noqa: B023
        soft = timm.SoftTargetCrossEntropy()
        of_soft = place.format("SoftTargetCrossEntropy")
        same_when_patched("timm", of_soft, lambda x: soft(x, SOFT.to(dtype)), x)
        same_when_patched("timm", of_soft, lambda x: soft(x.view(2, 6, 7), SOFT.view(2, 6, 7).to(dtype)), x)

    @pytest.mark.parametrize("summed", [False, True])
    @pytest.mark.parametrize("weights", [{}, {"weight": SOFT[0], "pos_weight": SOFT[1] * 3}], ids=["", "weights"])
    @pytest.mark.parametrize("options", BINARY, ids=str)
    def test_binary_cross_entropy(self, options, weights, summed):
        timm = losses_of_timm()
        loss = timm.BinaryCrossEntropy(**options, **weights, sum_classes=summed)
        for target in (T.clamp(min=0), HARD, SOFT):
            place = "timm.loss.binary_cross_entropy.BinaryCrossEntropy.forward"
            same_when_patched("timm", place, lambda x: loss(x, target), X)  # noqa: B023

    def test_a_class_index_out_of_range_raises_what_it_raised(self):
        timm = losses_of_timm()
        losses = [timm.LabelSmoothingCrossEntropy(), timm.BinaryCrossEntropy(0.0), timm.BinaryCrossEntropy(0.1)]
        for loss in losses:
            for wrong in (T, T.clamp(min=0) + 1):  # -100, and one more than there are classes
                with pytest.raises(RuntimeError, match="out of bounds"):
                    loss(X, wrong)
                with fusedloss.patch("timm"), pytest.raises(RuntimeError, match="out of bounds"):
                    loss(X, wrong)

    def test_modules_script_and_compile(self):
        timm = losses_of_timm()
        loss, target = timm.LabelSmoothingCrossEntropy(), T.clamp(min=0)
        expected = value_and_grad(lambda x: loss(x, target), X)
        with fusedloss.patch("timm"):
            scripted = torch.jit.script(timm.SoftTargetCrossEntropy())
            torch._dynamo.reset()
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(value_and_grad(lambda x: compiled(x, target), X), expected)
            assert isinstance(loss, timm.LabelSmoothingCrossEntropy) and not loss.state_dict()
        torch._dynamo.reset()
        assert "fusedloss::" not in str(scripted.graph)

    def test_a_subclass_keeps_its_own(self):
        timm = losses_of_timm()

        class Doubled(timm.LabelSmoothingCrossEntropy):
            def forward(self, x: Tensor, target: Tensor) -> Tensor:
                return 2 * super().forward(x, target)

        target = T.clamp(min=0)
        place = "timm.loss.cross_entropy.LabelSmoothingCrossEntropy.forward"
        same_when_patched("timm", place, lambda x: Doubled()(x, target), X)
