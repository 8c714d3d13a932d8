"""What a loss of plain tensors says to a DTensor."""

from typing import Any


def refuse_dtensor(function: str, name: str, tensor: Any, expected: str, remedy: str) -> None:
    if any(kind.__name__ == "DTensor" for kind in type(tensor).__mro__):
        raise RuntimeError(
            f"{function}: expected {name} to be {expected} on every rank, got a DTensor of placements "
            f"{tensor.placements}; pass {name}.{remedy}()"
        )
