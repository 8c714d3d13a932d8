"""Where the public names are, and what a name in the wrong place is told."""

import re

import pytest
from compiler import ROOT

import fusedloss


def test_functional_exports_its_functions():
    functions = {name for name, value in vars(fusedloss.functional).items() if callable(value)}
    assert functions == set(fusedloss.functional.__all__)


def test_the_names_that_are_shown_are_public():
    assert {name for name in dir(fusedloss) if not name.startswith("__")} == {*fusedloss.__all__, "parallel"}
    assert all(getattr(fusedloss, name) is not None for name in dir(fusedloss))


def test_a_function_asked_of_the_package_names_its_place():
    with pytest.raises(AttributeError, match="no attribute 'cross_entropy'; use fusedloss.functional.cross_entropy"):
        _ = fusedloss.cross_entropy
    with pytest.raises(AttributeError, match="no attribute 'softmax'$"):
        _ = fusedloss.softmax
    with pytest.raises(ImportError):
        from fusedloss import pointwise  # noqa: F401


def test_every_folder_of_the_package_is_installed():
    listed = re.search(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fusedloss").rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} <= set(re.findall(r'"([^"]+)"', listed[1]))
