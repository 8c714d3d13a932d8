"""Fused losses in programs that do not name this package.

- ``_places``: which names of which packages have a loss here
- ``_calls``: what became of the calls of a loss
- ``_replacement``: what stands in a place
- ``_patch``: puts it there, and takes it away
- ``_models``: the same for the losses of one model
- ``_scope``: for one thread, by a mode
- ``_script``: for an unmodified script
"""

from ._patch import Patch as Patch
from ._patch import patch as patch
from ._scope import scope as scope
