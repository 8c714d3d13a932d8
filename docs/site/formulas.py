"""Formulas as pictures in the page, drawn when the site is built: no script, no font and nothing that is fetched."""

from html import escape

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

SIZE = 17  # pixels, where the text has 16
ziamath.config.svg2 = False  # glyphs as they are: shared ones would be one formula's, and hidden with it


def drawn(tex: str, inline: bool) -> str:
    """In the text's color. What is read aloud is the source."""
    formula = ziamath.Latex(tex, size=SIZE, color="currentColor", inline=inline)
    place = f'style="vertical-align: {formula.getyofst():.2f}px" ' if inline else ""
    return formula.svg().replace("<svg ", f'<svg {place}role="img" aria-label="{escape(tex)}" ', 1)


def inline(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(drawn(node.astext(), inline=True))
    raise nodes.SkipNode


def block(writer: HTML5Translator, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{drawn(node.astext(), inline=False)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("drawn", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
