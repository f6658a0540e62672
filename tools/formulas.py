"""A griffe extension: `.. math::` and `:math:` of docstrings become MathML.

Browsers draw MathML themselves, so that the documentation's formulas need no script. mkdocs.yml
names the extension.
"""

import re
from typing import Any

from griffe import Extension, Object
from latex2mathml.converter import convert

BLOCK = re.compile(r"^\.\. math::[ \t]*(.*(?:\n[ \t]+\S.*)*)$", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")


class Formulas(Extension):
    """Turns the formulas of every docstring into MathML."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the object's docstring; griffe calls this for each object it loads."""
        if obj.docstring is not None:
            text = BLOCK.sub(
                lambda found: f"<div>{_mathml(found[1], 'block')}</div>", obj.docstring.value
            )
            obj.docstring.value = INLINE.sub(lambda found: _mathml(found[1], "inline"), text)


def _mathml(tex: str, display: str) -> str:
    return str(convert(" ".join(tex.split()), display=display))
