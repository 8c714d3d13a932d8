"""The C++ of a custom loss: its functor, and the files that compile it into the kernels."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ._expression import OF_ROW, OF_THREE, Tree, names, of_difference, renamed
from ._printing import cpp


def functor(trees: Sequence[Tree], params: Mapping[str, float]) -> str:
    """The functor of a loss with these expressions for the value and its slopes by x, t and, where it has one, v."""
    own, declared, members = _members(params)
    operands = OF_THREE.names[: len(trees) - 1]
    arguments = f"({', '.join(f'[[maybe_unused]] T {name}' for name in operands)}) const"
    functions = "".join(
        f"  FUSEDLOSS_HD T {name}{arguments} {{ return {cpp(renamed(tree, own), operands)}; }}\n"
        for name, tree in zip(("value", "grad", "grad_target", "grad_third"), trees, strict=False)
    )
    takes = "takes_third" if "v" in operands else "takes_class_indices"
    return f"""
namespace fusedloss::FUSEDLOSS_ISA::functions {{

template <class T>
struct Expression {{
  static constexpr bool of_difference = {str(of_difference(trees[0])).lower()};
  static constexpr ResultDType result = ResultDType::Promoted;
  static constexpr bool {takes} = true;
  {declared}
  explicit FUSEDLOSS_HD Expression([[maybe_unused]] const double* given) {members} {{}}
{functions}}};

}}
"""


class RowTrees(NamedTuple):
    """The value of a row and its slopes, as csrc/losses/custom_row.h describes them."""

    value: Tree
    by_ce: Tree
    by_ce_alone: Tree
    by_nll_alone: Tree
    by_lse: Tree


def row_functor(trees: RowTrees, params: Mapping[str, float]) -> str:
    """The functor of a loss of rows."""
    own, declared, members = _members(params)
    named = f"[[maybe_unused]] const auto [{', '.join(OF_ROW.names)}] = at;"
    functions = "".join(
        f"  FUSEDLOSS_HD T {name}(const AtRow<T>& at) const {{\n    {named}\n"
        f"    return {cpp(renamed(tree, own), OF_ROW.names)};\n  }}\n"
        for name, tree in trees._asdict().items()
    )
    return f"""
namespace fusedloss::FUSEDLOSS_ISA {{
namespace functions {{

template <class T>
struct Expression {{
  static constexpr bool names_ce = {str("ce" in names(trees.value)).lower()};
  {declared}
  explicit FUSEDLOSS_HD Expression([[maybe_unused]] const double* given) {members} {{}}
{functions}}};

}}

template <class T>
using Own = CustomRow<T, functions::Expression<T>>;

}}
"""


def _members(params: Mapping[str, float]) -> tuple[dict[str, str], str, str]:
    """Names of their own for the parameters, so that they can be called as they like: double, M_PI, result. And how
    these are declared and initialised."""
    own = {name: f"param_{name}" for name in params}
    declared = f"T {', '.join(own.values())};" if params else ""
    members = ", ".join(f"{name}(T(given[{i}]))" for i, name in enumerate(own.values()))
    return own, declared, f": {members}" if members else ""


_ON_CPU = """
{target}
#include "kernels/custom.h"
#include "losses/functions.h"
#include "cpu/pointwise.inl"
#include "cpu/one_hot.inl"
#include "cpu/pointwise_tiles.inl"
{functor}
namespace fusedloss {{
{cuda}
extern "C" __attribute__((visibility("default"))) const CustomPointwise* fusedloss_custom() {{
  using namespace FUSEDLOSS_ISA;
  static const CustomPointwise custom = {{kCustomVersion, pointwise_traits<functions::Expression<double>>(),
                                         pointwise<functions::Expression>, {cuda_entries}}};
  return &custom;
}}
}}
"""

_CUDA_DECLARED = """\
int fusedloss_custom_cuda(PointwiseResult, const CudaPointwiseArgs&, CudaStream);
bool fusedloss_custom_cuda_has_kernels();
"""
_CUDA_ENTRIES = "fusedloss_custom_cuda, fusedloss_custom_cuda_has_kernels"

_ON_CUDA = """
#include "cuda/pointwise.cuh"
#include "losses/functions.h"
{functor}
namespace fusedloss {{
int fusedloss_custom_cuda(PointwiseResult result, const CudaPointwiseArgs& args, CudaStream stream) {{
{indexed}  return FUSEDLOSS_ISA::run_pointwise<FUSEDLOSS_ISA::functions::Expression>(result, args, stream);
}}
bool fusedloss_custom_cuda_has_kernels() {{
  using namespace FUSEDLOSS_ISA;
  return has_code(pointwise_dense<PointwiseResult::Sum, float, functions::Expression<float>>);
}}
}}
"""


# Class indices are read by kernels of their own, compiled for a list that names this loss alone.
_INDEXED = "  if (args.index) return cuda_indexed(Pointwise(0), result, args, stream);\n"
_INDEXED_ON_CUDA = """
#define FUSEDLOSS_ISA cuda
#include "losses/functions.h"
#include "losses/pointwise.h"
{functor}
#undef FUSEDLOSS_POINTWISE
#define FUSEDLOSS_POINTWISE(X) X(own, functions::Expression)
#include "cuda/pointwise_indexed.cu"
"""

# What the units of a loss of rows begin with: a list of softmax losses that names this one alone.
_OF_ROWS = """
{target}
#include "losses/custom_row.h"
{functor}
#undef FUSEDLOSS_SOFTMAX
#define FUSEDLOSS_SOFTMAX(X) X(own, Own)
"""
# They compile side by side, as those of the built-in losses do.
_ROWS_FORWARD = """
#include "kernels/custom.h"
#include "cpu/softmax_forward.inl"
namespace fusedloss {{
namespace FUSEDLOSS_ISA {{
void softmax_backward(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end);
void softmax_backward_part(Softmax, const SoftmaxArgs&, int64_t row, int64_t part);
bool softmax_with_grad(Softmax, const SoftmaxArgs&, int64_t begin, int64_t end, void* scratch, SoftmaxSums*);
}}
{cuda}
extern "C" __attribute__((visibility("default"))) const CustomSoftmax* fusedloss_custom() {{
  using namespace FUSEDLOSS_ISA;
  static const CustomSoftmax custom = {{
      kCustomSoftmaxVersion, softmax_traits<Own<double>>(), saved_by<Own<double>>,
      {{softmax_forward, softmax_backward, softmax_with_grad, softmax_part, softmax_backward_part}}, {cuda_entries}}};
  return &custom;
}}
}}
"""
_ROWS_ON_CPU = {
    "backward": '#include "cpu/softmax_backward.inl"\n',
    "with_grad": '#include "cpu/softmax_with_grad.inl"\n',
}
_ROWS_ON_CUDA = {
    "softmax": '#include "cuda/softmax.cu"\n',
    "targets": '#include "cuda/softmax_targets.cu"\n',
    "rows": """
#include "cuda/softmax_rows.cu"
namespace fusedloss {
bool fusedloss_custom_cuda_has_kernels() {
  using namespace FUSEDLOSS_ISA;
  return has_code(forward_rows<float, float, Own<float>, false>);
}
}
""",
    "tiles": '#include "cuda/softmax_tiles.cu"\n',
    "columns": '#include "cuda/softmax_columns.cu"\n',
}
_ROWS_CUDA_DECLARED = "bool fusedloss_custom_cuda_has_kernels();"
_ROWS_CUDA_ENTRIES = (
    "{cuda_softmax_divisor, cuda_softmax_forward, cuda_softmax_backward}, fusedloss_custom_cuda_has_kernels"
)

Units = dict[str, str]  # the text of each file


def of_elements(functor: str, target: str, on_cuda: bool) -> Units:
    """What is compiled for a pointwise loss."""
    declared, entries = (_CUDA_DECLARED, _CUDA_ENTRIES) if on_cuda else ("", "nullptr, nullptr")
    main = _ON_CPU.format(target=target, functor=functor, cuda=declared, cuda_entries=entries)
    units = {"main.cpp": main + _end_of(target)}
    if on_cuda:
        indexed = "takes_class_indices" in functor
        units["cuda.cu"] = _ON_CUDA.format(functor=functor, indexed=_INDEXED if indexed else "")
        if indexed:
            units["indexed.cu"] = _INDEXED_ON_CUDA.format(functor=functor)
    return units


def of_rows(functor: str, target: str, on_cuda: bool) -> Units:
    """What is compiled for a loss of rows."""
    declared, entries = (_ROWS_CUDA_DECLARED, _ROWS_CUDA_ENTRIES) if on_cuda else ("", "{}, nullptr")
    begin = _OF_ROWS.format(target=target, functor=functor)
    end = _end_of(target)
    units = {"forward.cpp": begin + _ROWS_FORWARD.format(cuda=declared, cuda_entries=entries) + end}
    units |= {f"{name}.cpp": begin + text + end for name, text in _ROWS_ON_CPU.items()}
    if on_cuda:
        begin = _OF_ROWS.format(target="#define FUSEDLOSS_ISA cuda", functor=functor)
        units |= {f"{name}.cu": begin + text for name, text in _ROWS_ON_CUDA.items()}
    return units


def _end_of(target: str) -> str:
    return '#include "cpu/isa/end_target.inl"\n' if target else ""
