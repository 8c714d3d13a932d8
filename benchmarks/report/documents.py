"""The marked blocks of a document, which are made of results:

<!-- report: the block's name -->
...
<!-- end of report -->
"""

import re
from collections.abc import Mapping

MARKER = re.compile(r"<!-- report: (.+?) -->|<!-- end of report -->")
BLOCK = re.compile(r"(<!-- report: (.+?) -->)(.*?)(<!-- end of report -->)", re.DOTALL)


def names(document: str) -> list[str]:
    """The blocks of a document in order. Each must begin and end before the next one."""
    found = [marker[1] for marker in MARKER.finditer(document)]  # a name, or None at an end
    if found[1::2] != [None] * (len(found) // 2) or None in found[::2] or len(found) % 2:
        raise ValueError(f"expected pairs of <!-- report: name --> and <!-- end of report -->, found {found}")
    return found[::2]


def rewritten(document: str, text_of: Mapping[str, str]) -> str:
    """The document with the text of each of its blocks."""
    if unknown := set(names(document)) - set(text_of):
        raise ValueError(f"expected blocks named {', '.join(sorted(text_of))}, found {', '.join(sorted(unknown))}")
    return BLOCK.sub(lambda block: f"{block[1]}\n\n{text_of[block[2]]}\n\n{block[4]}", document)


def without_blocks(document: str) -> str:
    """What is written by hand; lines keep their numbers."""
    names(document)
    return BLOCK.sub(lambda block: "\n" * block[0].count("\n"), document)
