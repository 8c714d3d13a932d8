"""The table of placements: every loss of DTensors is the whole loss, with its gradients, or raises.

python placed_ranks.py RANKS FOLDER CHECK...    runs checks; what fails is printed, and ends the process
"""

import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from processes import Collectives, error, expect, main, raises
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fusedloss
import fusedloss.functional as L

ROWS, CLASSES = 5, 4  # of which no number of ranks has equal shards


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Between 0 and 1, as the losses of probabilities want them."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)


Operands = dict[str, Tensor]
X, T, W, V = (numbers(ROWS, CLASSES, seed=seed) for seed in range(4))
SIGNS = (T > 0.5).double() * 2 - 1
INDEX = torch.tensor([0, 3, -100, 1, 2])


def _pointwise(name: str, *others: tuple[str, Tensor], **options: Any) -> tuple[Operands, Callable[..., Any]]:
    loss = getattr(L, name)
    named = [key for key, _ in others if key in ("weight", "pos_weight")]

    def run(operands: dict[str, Any], reduction: str) -> Any:
        given = [value for key, value in operands.items() if key not in named]
        return loss(*given, reduction=reduction, **{key: operands[key] for key in named}, **options)

    return {"x": X, **dict(others)}, run


# Operands of the input's shape, and the loss of them.
ALIKE = {
    "mse": _pointwise("mse_loss", ("t", T)),
    "mse, weight": _pointwise("mse_loss", ("t", T), ("weight", W)),
    "l1": _pointwise("l1_loss", ("t", T)),
    "smooth l1": _pointwise("smooth_l1_loss", ("t", T), beta=0.3),
    "huber": _pointwise("huber_loss", ("t", T), delta=0.3),
    "bce": _pointwise("binary_cross_entropy", ("t", T)),
    "bce, weight": _pointwise("binary_cross_entropy", ("t", T), ("weight", W)),
    "bce with logits": _pointwise("binary_cross_entropy_with_logits", ("t", T)),
    "bce with logits, weights": _pointwise(
        "binary_cross_entropy_with_logits", ("t", T), ("weight", W), ("pos_weight", V)
    ),
    "sigmoid focal": _pointwise("sigmoid_focal_loss", ("t", T)),
    "kl": _pointwise("kl_div", ("t", T)),
    "kl, log": _pointwise("kl_div", ("t", T), log_target=True),
    "poisson": _pointwise("poisson_nll_loss", ("t", T)),
    "gaussian": _pointwise("gaussian_nll_loss", ("t", T), ("var", V)),
    "margin ranking": _pointwise("margin_ranking_loss", ("t", T), ("y", SIGNS)),
    "hinge embedding": _pointwise("hinge_embedding_loss", ("y", SIGNS)),
    "soft margin": _pointwise("soft_margin_loss", ("y", SIGNS)),
    "multi-label soft margin": _pointwise("multilabel_soft_margin_loss", ("t", T)),
}
# Operands that broadcast or that are class indices: torch's, or an error.
OTHERS = {
    "mse, broadcast": _pointwise("mse_loss", ("t", T[:1])),
    "gaussian, broadcast": _pointwise("gaussian_nll_loss", ("t", T), ("var", V[:, :1])),
    "bce with logits, pos_weight": _pointwise("binary_cross_entropy_with_logits", ("t", T), ("pos_weight", V[0])),
    "bce, classes": _pointwise("binary_cross_entropy", ("i", INDEX), ignore_index=-100),
    "sigmoid focal, classes": _pointwise("sigmoid_focal_loss", ("i", INDEX), ignore_index=-100),
}


def _softmax(call: Callable[..., Any], *others: tuple[str, Tensor]) -> tuple[Operands, Callable[..., Any]]:
    return {"x": 4 * X, **dict(others)}, lambda operands, reduction: call(*operands.values(), reduction)


SOFTMAX = {
    "cross-entropy": _softmax(lambda x, i, r: L.cross_entropy(x, i, reduction=r), ("i", INDEX)),
    "cross-entropy, z-loss": _softmax(lambda x, i, r: L.cross_entropy(x, i, z_loss=0.1, reduction=r), ("i", INDEX)),
    "cross-entropy, tensor": _softmax(
        lambda x, i, r: L.cross_entropy(x, i, z_loss=torch.tensor(0.1), reduction=r), ("i", INDEX)
    ),
    "cross-entropy, smoothing": _softmax(
        lambda x, i, r: L.cross_entropy(x, i, label_smoothing=0.1, reduction=r), ("i", INDEX)
    ),
    "cross-entropy, probabilities": _softmax(lambda x, t, r: L.cross_entropy(x, t, reduction=r), ("t", T)),
    "cross-entropy, row weights": _softmax(
        lambda x, i, s, r: L.cross_entropy(x, i, sample_weight=s, reduction=r), ("i", INDEX), ("s", W[:, 0])
    ),
    "nll": _softmax(lambda x, i, r: L.nll_loss(x, i, reduction=r), ("i", INDEX)),
    "nll, row weights": _softmax(
        lambda x, i, s, r: L.nll_loss(x, i, sample_weight=s, reduction=r), ("i", INDEX), ("s", W[:, 0])
    ),
    "focal": _softmax(lambda x, i, r: L.focal_loss(x, i, reduction=r), ("i", INDEX)),
    "focal, tensor": _softmax(lambda x, i, r: L.focal_loss(x, i, gamma=torch.tensor(1.5), reduction=r), ("i", INDEX)),
    "log-probabilities": _softmax(lambda x, i, r: L.log_probs(x, i), ("i", INDEX)),
    "entropy": _softmax(lambda x, i, r: sum(L.log_probs(x, i, return_entropy=True)), ("i", INDEX)),
    "entropy, tensor": _softmax(
        lambda x, i, r: sum(L.log_probs(x, i, return_entropy=True, temperature=torch.tensor(0.7))), ("i", INDEX)
    ),
}


def placed(each: Tensor, mesh: Any, place: Any) -> Any:
    if place == Partial():
        return DTensor.from_local(each / dist.get_world_size(), mesh, [place], run_check=False)
    return distribute_tensor(each, mesh, [place])


def outcome(
    label: str, operands: Operands, run: Callable[..., Any], places: list[Any], reduction: str, inside: bool
) -> bool:
    """Whether the loss is made and right; False where it raises. What is wrong fails."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plain = {key: each.clone().requires_grad_(key in "xt") for key, each in operands.items()}
    try:
        exact = run(plain, reduction)
    except (RuntimeError, NotImplementedError):  # torch has no derivative by this target
        plain["t"].requires_grad_(False)
        exact = run(plain, reduction)
    leaves = [each for each in plain.values() if each.requires_grad]
    upstream = numbers(*exact.shape, seed=7)
    try:
        gradients = torch.autograd.grad((exact * upstream).sum(), leaves, allow_unused=True)
    except RuntimeError:
        plain["t"].requires_grad_(False)
        leaves = [plain["x"]]
        exact = run(plain, reduction)
        gradients = torch.autograd.grad((exact * upstream).sum(), leaves)
    ours = {}
    for (key, each), place in zip(plain.items(), places, strict=True):
        ours[key] = placed(each.detach().clone(), mesh, place).requires_grad_(each.requires_grad)
    with loss_parallel() if inside else nullcontext():
        try:
            loss = run(ours, reduction)
            whole = loss.full_tensor()
            made = torch.autograd.grad(
                (whole * upstream).sum(), [each for each in ours.values() if each.requires_grad], allow_unused=True
            )
        except (RuntimeError, NotImplementedError, ValueError, AssertionError):
            return False
    off = error(whole, exact.detach(), exact.detach())
    for found, wanted in zip(made, gradients, strict=True):
        if wanted is not None:
            off = max(off, error(found.full_tensor(), wanted, wanted))
    expect(off < 1e-12, f"{label}, {reduction}, {places}, loss_parallel {inside}: off by {off:.1e}, {loss.placements}")
    return True


WRONG: list[str] = []


def cells(calls: dict[str, Any], ours: Callable[[str, list[Any], bool], bool], insides: tuple[bool, ...]) -> None:
    for name, reduction in product(calls, ("mean", "sum", "none")):
        operands, run = calls[name]
        for first, second, inside in product(
            (Shard(0), Shard(1), Replicate(), Partial()), (None, Replicate()), insides
        ):
            places = []
            for key, each in operands.items():
                place = first if key == "x" or second is None else second
                if key != "x" and place == Partial():
                    place = Replicate()
                if isinstance(place, Shard) and (place.dim >= each.dim() or each.shape != operands["x"].shape):
                    place = Shard(0) if place.dim == 0 and each.shape[0] == ROWS else Replicate()
                places.append(place)
            try:
                made = outcome(name, operands, run, places, reduction, inside)
                expect(made or not ours(name, places, inside), f"{name}, {reduction}, {places}, {inside}: raises")
            except AssertionError as wrong:
                WRONG.append(str(wrong))
    expect(not WRONG, "\n".join(WRONG))


# ---- checks


def pointwise() -> None:
    warnings.simplefilter("ignore")
    cells(ALIKE, lambda name, places, _: places[0] != Partial(), (False,))
    cells(OTHERS, lambda name, places, _: False, (False,))


def softmax() -> None:
    def ours(name: str, places: list[Any], inside: bool) -> bool:
        return places[0] != Partial() and not any(each in name for each in ("tensor", "probabilities", "nll"))

    cells(SOFTMAX, ours, (False, True))


def layouts() -> None:
    """Losses stay where the input is, a sum and a mean are partial; nothing is gathered; a second mesh dimension."""
    ranks = dist.get_world_size()
    line = init_device_mesh("cpu", (ranks,))
    cases = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()])]
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        cases += [(square, list(places)) for places in product((Shard(0), Shard(1), Replicate()), repeat=2)]
    x = X.clone().requires_grad_()
    for (mesh, places), reduction in product(cases, ("mean", "sum", "none")):
        exact = L.huber_loss(x, T, reduction=reduction)
        (of_x,) = torch.autograd.grad(exact.sum(), x)
        ours, t = (distribute_tensor(each, mesh, places) for each in (X, T))
        ours.requires_grad_()
        with Collectives() as collectives:
            loss = L.huber_loss(ours, t, reduction=reduction)
        expect(not collectives.sent, f"{places}, {reduction}: {collectives.sent}")
        wanted = [Partial() if reduction != "none" and isinstance(each, Shard) else each for each in places]
        expect(list(loss.placements) == wanted, f"{places}, {reduction}: {loss.placements}")
        (got,) = torch.autograd.grad(loss.full_tensor().sum(), ours)
        off = max(error(loss.full_tensor(), exact.detach(), exact.detach()), error(got.full_tensor(), of_x, of_x))
        expect(off < 1e-12, f"{places}, {reduction}: off by {off:.1e}")
        expect(got.placements == ours.placements, f"{places}, {reduction}: {got.placements}")
    x, t = (distribute_tensor(each, line, [Shard(0)]).requires_grad_() for each in (X, T))
    path = fusedloss.explain(L.mse_loss, x, t)
    expect(path.startswith("fused") == bool(x.to_local().numel()), path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = L.mse_loss(X.to(dtype), T.to(dtype))
        got = L.mse_loss(x.detach().to(dtype), t.detach().to(dtype))
        expect(
            got.dtype == dtype and error(got.full_tensor(), exact.double(), exact.double()) < 2**-7, f"{dtype}: {got}"
        )


def compiled() -> None:
    """As in eager mode, in one graph; and the second derivative."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for place in (Shard(0), Shard(1)):
        torch._dynamo.reset()
        run = torch.compile(lambda x, t: L.mse_loss(x, t).full_tensor(), fullgraph=True, backend="aot_eager")
        x, t = (distribute_tensor(each, mesh, [place]) for each in (X, T))
        x.requires_grad_()
        y = X.clone().requires_grad_()
        exact = L.mse_loss(y, T)
        (of_y,) = torch.autograd.grad(exact, y, create_graph=True)
        (twice_y,) = torch.autograd.grad(of_y.square().sum(), y)
        for f in (run, lambda x, t: L.mse_loss(x, t).full_tensor()):
            loss = f(x, t)
            (of_x,) = torch.autograd.grad(loss, x)
            off = max(
                error(loss, exact.detach(), exact.detach()), error(of_x.full_tensor(), of_y.detach(), of_y.detach())
            )
            expect(off < 1e-12, f"{place}, compiled: off by {off:.1e}")
        (of_x,) = torch.autograd.grad(L.mse_loss(x, t).full_tensor(), x, create_graph=True)
        (twice_x,) = torch.autograd.grad(of_x.full_tensor().square().sum(), x)
        off = error(twice_x.full_tensor(), twice_y, twice_y)
        expect(off < 1e-12, f"{place}, second derivative: off by {off:.1e}")


def errors() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(X, mesh, [Shard(1)])
    i = distribute_tensor(INDEX, mesh, [Replicate()])
    with loss_parallel():
        for call in (lambda: L.nll_loss(x, i), lambda: L.log_probs(x, i, temperature=torch.tensor(2.0))):
            raises(RuntimeError, "got a DTensor of placements (Shard(dim=1),); leave loss_parallel", call)


if __name__ == "__main__":
    sys.exit(main(globals(), *sys.argv[1:]))
