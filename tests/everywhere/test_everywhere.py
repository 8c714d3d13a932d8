"""Every loss in every situation: the numbers of plain PyTorch, by the path that docs/compatibility.md names."""

import page
import pytest
from cells import path_of
from losses import ONE_OF_EACH, REDUCTIONS
from marks import needs_extension, on_cpu_alone
from situations import SITUATIONS

pytestmark = [
    needs_extension,
    on_cpu_alone("the page is about the CPU; gpu/test_gpu.py runs transforms and graphs on a GPU"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.thinned(1)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("loss", [loss.name for loss in ONE_OF_EACH])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_everywhere(situation, loss, reduction):
    cell = (situation, loss, reduction)
    path = path_of(cell)
    assert page.read().get(cell) == path, "the page is stale: python tests/everywhere/page.py"


def test_the_page_is_generated():
    assert page.text(page.read()) == page.PAGE.read_text()
