"""How cases, machines, times and bytes are written."""

import re
from collections.abc import Iterable

PROVIDERS = {"eager": "torch eager", "compile": "torch.compile", "fused": "fusedloss"}
LOSSES = {
    "cross_entropy": "cross-entropy",
    "row_weighted_cross_entropy": "a weight for each row",
    "smoothed_cross_entropy": "label smoothing and class weights",
    "soft_cross_entropy": "class probabilities",
    "focal": "softmax focal",
    "sigmoid_focal_indexed": "sigmoid focal, class indices",
    "sigmoid_focal": "sigmoid focal",
    "huber": "Huber",
    "smooth_l1": "smooth L1",
    "mse": "MSE",
    "l1": "L1",
    "bce": "BCE",
    "bce_with_logits": "BCE with logits",
    "bce_with_logits_and_weights": "BCE with logits, weight and pos_weight",
    "bce_with_logits_and_pos_weight": "BCE with logits, pos_weight",
    "kl_div": "KL divergence",
    "kl_div_log_target": "KL divergence, log target",
    "kl_divergence": "distillation",
    "poisson_nll": "Poisson NLL",
    "poisson_nll_full": "Poisson NLL, full",
    "gaussian_nll": "Gaussian NLL",
    "linear_cross_entropy": "linear cross-entropy",
    "linear_cross_entropy_half_ignored": "the same, half of the rows ignored",
    "custom_pseudo_huber": "pseudo-Huber of one's own",
    "custom_log_cosh": "log-cosh of one's own",
}
NAME = re.compile(r"(?P<loss>\w+)-(?P<dtype>fp32|bf16)-(?P<sizes>[\dx]+)(?P<rest>(-\w+)?)")


def parts(case: str) -> re.Match[str]:
    found = NAME.fullmatch(case)
    if not found:
        raise ValueError(f"expected a case named as cross_entropy-fp32-512x32000, got {case}")
    return found


def shape(case: str) -> tuple[int, ...]:
    return tuple(map(int, parts(case)["sizes"].split("x")))


def case(name: str) -> str:
    """cross_entropy-bf16-512x32000 is cross-entropy (512, 32000) bf16."""
    found, sizes = parts(name), shape(name)
    loss = LOSSES.get(found["loss"], found["loss"].replace("_", " "))
    of = f" ({', '.join(map(str, sizes))})" if len(sizes) > 1 else f", {count(sizes[0])} element" + "s" * (sizes[0] > 1)
    dtype = "" if found["dtype"] == "fp32" else " bf16"
    return loss + of + found["rest"].replace("-", ", ") + dtype


def count(number: int) -> str:
    return f"{number >> 20}M" if number >= 1 << 20 and number % (1 << 20) == 0 else f"{number:,}"


def megabytes(size: float) -> str:
    """The number alone."""
    value = size / 1e6
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 2 else f"{value:.1f}x"


def spread(values: Iterable[float], form: str = "{:.2f}", unit: str = "") -> str:
    """The least and the most of some figures: 0.90 to 1.02, or one of them where they are written alike."""
    found = sorted(values)
    low, high = form.format(found[0]), form.format(found[-1])
    return (low if low == high else f"{low} to {high}") + unit


def where(machine: dict[str, str]) -> str:
    """What a figure of a CPU depends on, in a few words."""
    threads = machine["threads"]
    told = [machine["device"], machine["instruction set"], f"{threads} thread" + "s" * (threads != "1")]
    return ", ".join([*told, f"torch {machine['torch'].partition('+')[0]}", machine["date"]])


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown. A column in which every cell is empty is left out."""
    cells = [list(row) for row in rows]
    kept = [i for i in range(len(head)) if any(row[i] for row in cells)]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)
