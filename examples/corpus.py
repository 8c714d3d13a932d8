"""The Python standard library's own source as token ids: real text that every machine has."""

import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

LAYOUT = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)


def source_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    return sorted(path for path in root.rglob("*.py") if not skipped.intersection(path.relative_to(root).parts))


def tokens_of(path: Path) -> Iterator[str]:
    try:
        with tokenize.open(path) as file:
            for token in tokenize.generate_tokens(file.readline):
                yield tokenize.tok_name[token.type] if token.type in LAYOUT else token.string
    except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
        return  # a file that is broken on purpose


def token_ids(vocabulary: int, limit: int) -> np.ndarray:
    """Up to `limit` tokens; id 0 stands for all that are not among the most frequent `vocabulary` - 1."""
    tokens: list[str] = []
    for path in source_files():
        tokens.extend(tokens_of(path))
        if len(tokens) >= limit:
            break
    tokens = tokens[:limit]
    known = {token: id for id, (token, _) in enumerate(Counter(tokens).most_common(vocabulary - 1), start=1)}
    return np.array([known.get(token, 0) for token in tokens], dtype=np.int64)
