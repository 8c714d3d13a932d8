"""The documentation as a site: it builds without a warning, has every public name, and works without a network."""

import os
import re
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
from compiler import ROOT
from marks import on_cpu_alone

import fusedloss.parallel

# What a browser fetches by itself. A link that a reader may follow is no such thing.
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source|object)\b[^>]*\b(?:src|href|data)=["']?(?:\w+:)?//[^>]*>""")
FETCHED_BY_STYLE = re.compile(r"""(?:@import|url\()\s*["']?(?:\w+:)?//[^;)]*""")


def names_on(site: Path) -> set[str]:
    """What the site has a place for, by the inventory that Sphinx writes: four lines, then a name in each."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


def fetched_by(site: Path) -> list[str]:
    pages = [found for page in site.rglob("*.html") for found in FETCHED.findall(page.read_text())]
    styles = [found for style in site.rglob("*.css") for found in FETCHED_BY_STYLE.findall(style.read_text())]
    return pages + styles


@pytest.mark.deep("a build of the whole site, 15 CPU-seconds; of_tests/test_documents.py covers what it shows")
@pytest.mark.skipif(
    not all(map(find_spec, ("sphinx", "furo", "myst_parser", "ziamath"))),
    reason="what builds the site is not installed (make site); of_tests/test_documents.py covers the documents",
)
@on_cpu_alone("a site is built without a device")
def test_the_site_builds_has_every_name_and_fetches_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "docs.site.build", str(site)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    modules = (fusedloss, fusedloss.functional, fusedloss.parallel)
    public = {f"{module.__name__}.{name}" for module in modules for name in module.__all__}
    assert public - names_on(site) == set()
    assert all((site / "losses" / f"{name}.html").exists() for name in fusedloss.functional.__all__)

    assert fetched_by(site) == []
    assert "huber_loss" in (site / "searchindex.js").read_text()


def test_what_a_page_fetches_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text('<script src="https://host/a.js"></script><a href="https://host">to read</a>')
    (tmp_path / "site.css").write_text("a { background: url('//host/b.png') } b { background: url(c.png) }")
    assert fetched_by(tmp_path) == ['<script src="https://host/a.js">', "url('//host/b.png'"]
