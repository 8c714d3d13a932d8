"""Every loss in every situation: the numbers of plain PyTorch, by the path that docs/compatibility.md names."""

import page
import pytest
from cells import LOSSES, path_of
from losses import REDUCTIONS
from marks import needs_extension, on_cpu_alone
from situations import SITUATIONS

pytestmark = [
    needs_extension,
    on_cpu_alone("the page is about the CPU; gpu/test_gpu.py runs transforms and graphs on a GPU"),
    pytest.mark.filterwarnings("ignore"),
]


OF_COMPILERS = [
    name for name in SITUATIONS if any(word in name for word in ("compile", "export", "decompositions", "make_fx"))
]
each_loss = pytest.mark.parametrize("loss", [loss.name for loss in LOSSES])
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def check(*cell: str) -> None:
    assert page.read().get(cell) == path_of(cell), "the page is stale: python tests/everywhere/page.py"


@pytest.mark.thinned(1)
@pytest.mark.parametrize("situation", [name for name in SITUATIONS if name not in OF_COMPILERS])
@each_loss
@each_reduction
def test_everywhere(situation, loss, reduction):
    check(situation, loss, reduction)


# Half a second each: page.py runs them all.
@pytest.mark.thinned(1, deep=1)
@pytest.mark.parametrize("situation", OF_COMPILERS)
@each_loss
@each_reduction
def test_everywhere_under_a_compiler(situation, loss, reduction):
    check(situation, loss, reduction)


def test_the_page_is_generated():
    assert page.text(page.read()) == page.PAGE.read_text()
