"""torch's own modules in every situation, patched: what they gave, fused where our function would be."""

import page
import pytest
import torch.nn.functional as F
from cells import OF_ROWS, compared, third_of
from losses import ONE_OF_EACH, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from situations import SITUATIONS
from test_everywhere import OF_COMPILERS
from torch import Tensor, nn

import fusedloss
from fusedloss.adoption._places import places

pytestmark = [
    needs_extension,
    on_cpu_alone("the page is about the CPU"),
    pytest.mark.filterwarnings("ignore"),
]
MODULES = {
    "cross_entropy": lambda loss, **how: nn.CrossEntropyLoss(label_smoothing=(*loss.params, 0.0)[0], **how),
    "soft_cross_entropy": lambda loss, **how: nn.CrossEntropyLoss(**how),
    "nll": lambda loss, **how: nn.NLLLoss(**how),
    "mse": lambda loss, **how: nn.MSELoss(**how),
    "l1": lambda loss, **how: nn.L1Loss(**how),
    "smooth_l1": lambda loss, **how: nn.SmoothL1Loss(**how),
    "huber": lambda loss, **how: nn.HuberLoss(delta=loss.params[0], **how),
    "binary_cross_entropy": lambda loss, **how: nn.BCELoss(**how),
    "binary_cross_entropy_with_logits": lambda loss, **how: nn.BCEWithLogitsLoss(**how),
    "hinge_embedding": lambda loss, **how: nn.HingeEmbeddingLoss(*loss.params, **how),
    "soft_margin": lambda loss, **how: nn.SoftMarginLoss(**how),
    "kl_div": lambda loss, **how: nn.KLDivLoss(**how),
    "poisson_nll": lambda loss, **how: nn.PoissonNLLLoss(**how),
    "margin_ranking": lambda loss, **how: nn.MarginRankingLoss(*loss.params, **how),
    "gaussian_nll": lambda loss, **how: nn.GaussianNLLLoss(full=bool(loss.params[1]), eps=loss.params[0], **how),
    "cosine embedding": lambda loss, **how: nn.CosineEmbeddingLoss(**how),
    "triplet margin": lambda loss, **how: nn.TripletMarginLoss(**how),
    "multi margin": lambda loss, **how: nn.MultiMarginLoss(**how),
}
LOSSES = {loss.name: loss for loss in (*ONE_OF_EACH, *OF_ROWS) if loss.op in MODULES}
# What a loss takes beside its input, from a target between 0 and 1.
OTHERS = {
    "cosine embedding": lambda t: (t, 2 * t[..., 0].round() - 1),
    "triplet margin": lambda t: (t, t.flip(-1)),
    "multi margin": lambda t: (t.argmax(-1),),
}
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


# Where the program or the mode keeps torch's functions, and patched ones call those.
ORIGINALS = [
    "a `TorchFunctionMode`",
    "`export`",
    "`export`, a dynamic batch",
    "`run_decompositions`",
    "`make_fx`",
    "`make_fx` of a gradient, run twice",
]
# torch's functions ask for a number there, or warn, and are refused; ours are not, when patched too.
ONLY_PATCHED = {
    "gaussian_nll": [*OF_COMPILERS, "meta tensors", "`FakeTensorMode`", "`FakeTensorMode` around plain tensors"],
    "kl_div": [name for name in OF_COMPILERS if name.startswith("`compile")],
}


def check(situation: str, name: str, reduction: str) -> None:
    loss = LOSSES[name]
    if situation in ONLY_PATCHED.get(loss.op, []):
        return
    module = MODULES[loss.op](loss, reduction=reduction)
    # torch.fx takes a module for one of the model that it traces.
    function = module.forward if situation == "`fx.symbolic_trace`" else module

    def call(input: Tensor, target: Tensor) -> Tensor:
        if loss.op in OTHERS:
            return function(input, *OTHERS[loss.op](target))
        third = [third_of(loss, target)] if loss.op in ("margin_ranking", "gaussian_nll") else []
        return function(input, target, *third)

    path = compared(situation, loss, call, call, fusedloss.patch)
    expected = "native" if situation in ORIGINALS else page.read()[situation, name, reduction]
    # A graph names torch's functions; run as it is, it may call a patched one by that name.
    assert path == expected or (situation in OF_COMPILERS and (path, expected) == ("fused", "native"))


def test_every_function_that_is_patched_is_here():
    """But two, which the table has in other words: a sum of binary cross-entropies, and a loss of hidden states."""
    covered = {op if hasattr(F, op) else f"{op.replace(' ', '_')}_loss" for op in MODULES} - {"soft_cross_entropy_loss"}
    rest = {place.name for place in places("torch")} - covered
    assert rest <= {"multilabel_soft_margin_loss", "linear_cross_entropy"}, "name its module above"


@pytest.mark.thinned(1, deep=2)
@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name not in OF_COMPILERS])
@each_loss
@each_reduction
def test_everywhere(situation, loss, reduction):
    check(situation, loss, reduction)


@pytest.mark.deep("torch's modules under compilers, patched; the situations of eager mode ran")
@pytest.mark.thinned(1, deep=1)
@pytest.mark.parametrize("situation", OF_COMPILERS)
@each_loss
@each_reduction
def test_everywhere_under_a_compiler(situation, loss, reduction):
    check(situation, loss, reduction)
