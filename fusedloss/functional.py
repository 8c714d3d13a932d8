"""The losses as functions, with the names and positional arguments of ``torch.nn.functional``."""

from . import _scripted
from .losses.asymmetric import *  # noqa: F403
from .losses.asymmetric import __all__ as _asymmetric
from .losses.binary import *  # noqa: F403
from .losses.binary import __all__ as _binary
from .losses.cross_entropy import *  # noqa: F403
from .losses.cross_entropy import __all__ as _cross_entropy
from .losses.difference import *  # noqa: F403
from .losses.difference import __all__ as _difference
from .losses.distillation import *  # noqa: F403
from .losses.distillation import __all__ as _distillation
from .losses.divergence import *  # noqa: F403
from .losses.divergence import __all__ as _divergence
from .losses.focal import *  # noqa: F403
from .losses.focal import __all__ as _focal
from .losses.linear import *  # noqa: F403
from .losses.linear import __all__ as _linear
from .losses.linear_distillation import *  # noqa: F403
from .losses.linear_distillation import __all__ as _linear_distillation
from .losses.log_probs import *  # noqa: F403
from .losses.log_probs import __all__ as _log_probs
from .losses.margin import *  # noqa: F403
from .losses.margin import __all__ as _margin
from .losses.nll import *  # noqa: F403
from .losses.nll import __all__ as _nll
from .losses.row_sums import *  # noqa: F403
from .losses.row_sums import __all__ as _row_sums
from .losses.sigmoid_focal import *  # noqa: F403
from .losses.sigmoid_focal import __all__ as _sigmoid_focal

__all__ = [
    *_asymmetric,
    *_binary,
    *_cross_entropy,
    *_difference,
    *_distillation,
    *_divergence,
    *_focal,
    *_linear,
    *_linear_distillation,
    *_log_probs,
    *_margin,
    *_nll,
    *_row_sums,
    *_sigmoid_focal,
]

for _name in __all__:
    _scripted.let_script(globals()[_name])
