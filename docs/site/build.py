"""Builds the documentation as a site: ``python -m docs.site.build [folder]``, by default into build/docs.

The pages are the documents of the repository, and those that ``losses.py`` and ``api.py`` make of the docstrings. They
are laid out in build/pages as the repository is, so that a link that works there works on the site too.
"""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from . import api, losses

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# The navigation. A document that it does not name comes last.
SECTIONS = {
    "Use": ["docs/quickstart", "docs/adopting", "examples/index"],
    "Losses": ["losses/index", "docs/linear", "docs/distillation", "docs/parallel"],
    "What to expect": ["docs/compatibility", "docs/native", "docs/differences", "docs/performance"],
    "Reference": [f"api/{name}" for name in api.PAGES],
    "Develop": ["CONTRIBUTING", "tests/index", "docs/releasing", "CHANGELOG", "SECURITY"],
}
LINK = re.compile(r"\]\(([^)#\s:]+)")


def documents() -> list[Path]:
    here = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "tests" / "README.md"]
    return sorted(path.relative_to(ROOT) for path in here)


def place(path: Path) -> Path:
    """Where a document lies on the site: a README is the first page of its folder."""
    return path.with_name("index.md") if path.name == "README.md" else path


def linked(text: str, folder: Path) -> str:
    """A link to a README or a folder leads to the first page there."""

    def moved(link: re.Match[str]) -> str:
        target = Path(link[1])
        end = target / "index.md" if (ROOT / folder / target).is_dir() else place(target)
        return f"]({end}"

    return LINK.sub(moved, text)


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""])


def navigation(pages: list[Path]) -> str:
    named = {page for section in SECTIONS.values() for page in section}
    others = sorted({str(page.with_suffix("")) for page in pages} - named - {"index"})
    sections = {**SECTIONS, "More": others} if others else SECTIONS
    return "\n" + "\n".join(toctree(caption, section) for caption, section in sections.items())


def example_pages() -> dict[Path, str]:
    """A page for each file of examples/, and the list of them."""
    found, lines = {}, ["# Examples", "", "Programs that run as they are, and what they share.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        code = f"```{{literalinclude}} {path.name}\n:language: python\n```\n"
        found[Path("examples", path.stem + ".md")] = f"# {path.name}\n\n{said}\n\n{code}"
        lines.append(f"- [{path.name}]({path.stem}.md): {said.splitlines()[0]}")
    names = "\n".join(page.stem for page in found)
    lines += ["", "```{toctree}", ":hidden:", "", names, "```", ""]
    return {**found, Path("examples", "index.md"): "\n".join(lines)}


def lay_out(folder: Path) -> None:
    texts = {place(path): linked((ROOT / path).read_text(), path.parent) for path in documents()}
    texts[Path("index.md")] += navigation(list(texts))
    texts |= example_pages() | losses.pages((ROOT / "docs" / "differences.md").read_text()) | api.pages()
    files = [ROOT / "LICENSE", *ROOT.glob("docs/*.svg"), *ROOT.glob("examples/*.py")]
    shutil.rmtree(folder, ignore_errors=True)
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    for path in files:
        shutil.copy(path, folder / path.relative_to(ROOT))


def main(arguments: list[str]) -> int:
    site = Path(arguments[0]) if arguments else ROOT / "build" / "docs"
    pages = site.with_name(f"{site.name}-pages")
    lay_out(pages)
    shutil.rmtree(site, ignore_errors=True)
    options = ["-q", "-E", "-W", "--keep-going", "-j", str(min(4, os.cpu_count() or 1)), "-b", "html", "-c", str(HERE)]
    return sphinx([*options, "-d", str(pages / ".doctrees"), str(pages), str(site)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
