"""Math as MathML, which browsers draw themselves: the pages load no script, so they read the same
without a network.
"""

from __future__ import annotations

import re

from docutils import nodes
from latex2mathml.converter import convert


def _mathml(latex: str, display: str) -> str:
    """Convert, and set named functions apart from what stands around them."""
    spaced = r'<mrow><mspace width="0.17em" /><mi>\1</mi><mspace width="0.17em" /></mrow>'
    return re.sub("(?<!<msup>)<mi>(tanh|log|exp)</mi>", spaced, convert(latex, display=display))


def _inline(self, node: nodes.math) -> None:
    self.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _display(self, node: nodes.math_block) -> None:
    self.body.append(
        f'<div class="math" style="margin: 1em 0">{_mathml(node.astext(), "block")}</div>\n'
    )
    raise nodes.SkipNode


def setup(app) -> dict[str, bool]:
    """Register the renderer under the name that `html_math_renderer` asks for."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
