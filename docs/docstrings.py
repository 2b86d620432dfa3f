"""What mkdocstrings is to make of docstrings: equations and examples in blocks of code, names without their roles."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):`~?(?:l2l_fast\.)?([^`]*)`")
EQUATION = re.compile(r"<-|^\S+ = |\bsum_|→")


def readable(text: str) -> str:
    """A docstring in Google's style as mkdocstrings reads it best."""
    text = re.sub(r"^(\s*)Example:$", r"\1Examples:", ROLE.sub(r"`\1`", text), flags=re.MULTILINE)
    return "\n\n".join(map(_paragraph, text.split("\n\n")))


def _paragraph(text: str) -> str:
    """An equation that stands alone, indented as code."""
    alone = not text.startswith((" ", ">>>")) and text.strip() and not text.rstrip().endswith((".", ":"))
    if not (alone and EQUATION.search(text)) or len(text.splitlines()) > 3:
        return text
    return "\n".join(f"    {line}" for line in text.splitlines())


class Readable(griffe.Extension):
    """Applies ``readable`` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            obj.docstring.value = readable(obj.docstring.value)
