"""Divergences of a student's distributions over classes from a teacher's."""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import has_torch_function_variadic

from .. import _route
from ..distillation import _top_k
from ..distillation._formula import DIRECTIONS, REDUCTIONS, TEACHERS, Call
from ..distillation._route import divergence, run
from ._dtensors import is_dtensor, served_divergence
from ._numbers import NUMBERS, checked, refuse_others

__all__ = ["kl_divergence"]

Teacher = Tensor | tuple[Tensor, Tensor]


# fmt: off
@overload
def kl_divergence(
    student_logits: Tensor, teacher: Teacher, *, temperature: float = ..., direction: str = ..., beta: float = ...,
    teacher_is: str = ..., labels: Tensor | None = ..., ignore_index: int = ..., weight: Tensor | None = ...,
    reduction: str = ..., return_lse: Literal[False] = ..., rest: str = ...,
) -> Tensor: ...

@overload
def kl_divergence(
    student_logits: Tensor, teacher: Teacher, *, temperature: float = ..., direction: str = ..., beta: float = ...,
    teacher_is: str = ..., labels: Tensor | None = ..., ignore_index: int = ..., weight: Tensor | None = ...,
    reduction: str = ..., return_lse: Literal[True], rest: str = ...,
) -> tuple[Tensor, Tensor]: ...

@overload
def kl_divergence(
    student_logits: Tensor, teacher: Teacher, *, temperature: float = ..., direction: str = ..., beta: float = ...,
    teacher_is: str = ..., labels: Tensor | None = ..., ignore_index: int = ..., weight: Tensor | None = ...,
    reduction: str = ..., return_lse: bool, rest: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
# fmt: on


def kl_divergence(
    student_logits: Tensor,
    teacher: Teacher,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
    beta: float = 0.5,
    teacher_is: str = "logits",
    labels: Tensor | None = None,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    return_lse: bool = False,
    rest: str = "bucket",
) -> Any:
    r"""Divergence of a student's distribution over classes from a teacher's, for every row of logits.

    With q the softmax of ``student_logits / temperature`` and p the teacher's probabilities, forward, reverse and
    Jensen-Shannon divergence are

    .. math:: \mathrm{KL}(p \| q) = \sum_c p_c \log \frac{p_c}{q_c}, \qquad \mathrm{KL}(q \| p), \qquad
              \beta \, \mathrm{KL}(p \| m) + (1 - \beta) \, \mathrm{KL}(q \| m), \quad m = \beta p + (1 - \beta) q

    A class of probability 0 adds nothing on its own side (0 log 0 = 0), so that classes may be masked by -infinity.
    Where p has mass and q none, the forward divergence is infinite, and where q has and p not, the reverse one. What
    rounds to 0 in the arithmetic is no mass.

    Both rows are read once and their gradient written once, in which q - p is formed in float32 (float64 for float64
    rows): no log-softmax and no probability of either is ever in memory.

    Args:
        student_logits: (..., C), the classes last; float32, float64, bfloat16 or float16. DTensors take
            :func:`fusedloss.parallel.kl_divergence` where their classes are cut.
        teacher: numbers of the same shape, in any of these dtypes; or a pair (indices, log-probabilities), both
            (..., k), of the k most probable classes of each row.
        temperature: divides the logits of both; positive.
        direction: ``"forward"``, ``"reverse"`` or ``"jsd"``.
        beta: of ``"jsd"``, in [0, 1]. At both ends the divergence is 0; other libraries take these for forward and
            reverse.
        teacher_is: what the teacher's numbers are: ``"logits"``, ``"log_probs"`` or ``"probs"``. The latter two are
            taken as they are, whatever the temperature and their sum; log-probabilities that are to be softened are
            logits.
        labels: integers (...), of which only those equal to ``ignore_index`` matter: their rows count nowhere and get
            no gradient, whatever their logits.
        ignore_index: that label.
        weight: a factor for each row (...). A mean divides by the sum of the weights of the rows that count; a row of
            weight 0 is as an ignored one.
        reduction: ``"batchmean"``, the mean over the rows that count, ``"mean"``, that over their C classes too, as
            torch's losses have it, ``"sum"``, or ``"none"``, a number for each row. A mean of no rows is NaN, with a
            gradient of 0, as that of :func:`cross_entropy`.
        return_lse: returns ``(loss, lse)``, the differentiable logsumexp of ``student_logits / temperature`` of every
            row, ignored ones too.
        rest: what becomes of the classes that a teacher of k classes leaves out: ``"bucket"`` takes them for one class
            more, whose probability is what the k leave, on both sides; ``"renormalise"`` compares the two distributions
            among the k classes alone.

    Returns:
        In the dtype of the logits; beside a wider teacher, and under autocast, in float32 of bfloat16 and float16.

    Gradients: the teacher's is made natively, and so are second derivatives. A teacher of k classes runs natively, but
    for the lse. A gradient is made in the forward pass on a CPU, as for :func:`cross_entropy`.

    Raises:
        ValueError: the shapes of student and teacher, of labels or of weights do not fit; ``temperature`` is not
            positive, or ``beta`` not in [0, 1]; ``direction``, ``teacher_is``, ``reduction`` or ``rest`` is unknown.
        IndexError: one of the k indices is out of range, on the CPU.
        TypeError: ``temperature`` or ``beta`` is no number, nor a tensor of one.

    >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> kl_divergence(student, teacher)
    tensor(0.4338)
    >>> kl_divergence(student, teacher, temperature=2.0, direction="jsd")
    tensor(0.0285)
    >>> kl_divergence(student, (torch.tensor([[1]]), torch.tensor([[0.5]]).log()))
    tensor(0.4338)
    """
    given = (student_logits, *(teacher if isinstance(teacher, tuple) else (teacher,)), labels, weight)
    if has_torch_function_variadic(*given) and _route.overrides_apply():
        return _route.overridden(
            kl_divergence, given, student_logits, teacher, temperature=temperature, direction=direction, beta=beta,
            teacher_is=teacher_is, labels=labels, ignore_index=ignore_index, weight=weight, reduction=reduction,
            return_lse=return_lse, rest=rest,
        )  # fmt: skip
    if not is_compiling() and not _route.asked() and rest in _top_k.RESTS:
        results = run(
            student_logits, teacher, labels, weight, direction, teacher_is, reduction, ignore_index, temperature, beta,
            return_lse,
        )  # fmt: skip
        if results is not None:
            return results
    check_names(direction=direction, teacher_is=teacher_is, reduction=reduction, rest=rest)
    temperature, beta = checked_numbers("kl_divergence", temperature, beta)
    indices, numbers = teacher if isinstance(teacher, tuple) else (None, teacher)
    if not (isinstance(student_logits, Tensor) and isinstance(numbers, Tensor)):
        refuse_others("kl_divergence", student_logits=student_logits, teacher=numbers)
    if not student_logits.is_nested:  # a nested one has no shape, and what torch says of it is clearer
        _check_shapes(student_logits, indices, numbers, labels, weight)
    call = Call(
        student_logits, numbers, labels, weight, direction, teacher_is, reduction, ignore_index, temperature, beta
    )
    if indices is not None:
        if teacher_is == "probs":
            raise ValueError("a teacher of indices holds log-probabilities beside them, got teacher_is='probs'")
        _route.tell_native(_top_k.WHY_NATIVE)
        loss, lse = _top_k.divergence(call, indices, rest, return_lse)
    else:
        if is_dtensor(student_logits) and (made := served_divergence(call, return_lse)) is not None:
            return made
        loss, lse = divergence(call, return_lse)
    return (loss, lse) if return_lse else loss


_NAMES = {"direction": DIRECTIONS, "teacher_is": TEACHERS, "reduction": REDUCTIONS, "rest": _top_k.RESTS}


def check_names(**given: str) -> None:
    for name, value in given.items():
        if value not in _NAMES[name]:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, _NAMES[name]))}, got {value!r}")


def checked_numbers(function: str, temperature: Any, beta: Any) -> tuple[Any, Any]:
    if not isinstance(temperature, NUMBERS):
        temperature = checked(function, "temperature", temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if not isinstance(beta, NUMBERS):
        beta = checked(function, "beta", beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be from 0 to 1, got {beta}")
    return temperature, beta


def _check_shapes(
    student: Tensor, indices: Tensor | None, teacher: Tensor, labels: Tensor | None, weight: Tensor | None
) -> None:
    if student.dim() < 1:
        raise ValueError(f"student_logits must have a dimension of classes, got shape {tuple(student.shape)}")
    shape, rows = tuple(student.shape), tuple(student.shape[:-1])
    if indices is not None:
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise ValueError(f"the indices of a teacher must be integers, got {indices.dtype}")
        if indices.shape != teacher.shape:
            raise ValueError(
                f"the indices and log-probabilities of a teacher must be of one shape, got {tuple(indices.shape)} and "
                f"{tuple(teacher.shape)}"
            )
        if tuple(teacher.shape[:-1]) != rows or teacher.dim() != student.dim():
            raise ValueError(
                f"a teacher of k classes must be of the student's rows {rows}, got shapes {shape} of the student and "
                f"{tuple(teacher.shape)} of the teacher"
            )
    elif student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must be of one shape, got student_logits {shape} and teacher {tuple(teacher.shape)}"
        )
    for name, tensor in (("student_logits", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating point dtype, got {tensor.dtype}")
    check_of_rows(rows, labels, weight)


def check_of_rows(rows: tuple[int, ...], labels: Tensor | None, weight: Tensor | None) -> None:
    if labels is not None and labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if weight is not None and not weight.is_floating_point():
        raise ValueError(f"weight must be of a floating point dtype, got {weight.dtype}")
    for name, of_rows in (("labels", labels), ("weight", weight)):
        if of_rows is not None and tuple(of_rows.shape) != rows:
            raise ValueError(f"{name} must be of the rows' shape {rows}, got shape {tuple(of_rows.shape)}")
