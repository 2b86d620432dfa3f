"""What mkdocstrings is to make of docstrings: equations and examples in blocks of code, names without their roles.

The options of the MetaTrainer stand in a dataclass, from which its signature and docstring are made when it is
imported. The site is built from the sources alone, so they are put in place here.
"""

import ast
import re
from pathlib import Path

import griffe

OPTIONS = Path(__file__).parent.parent / "l2l_fast" / "meta" / "options.py"
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


def trainer_options() -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each."""
    (found,) = [
        node
        for node in ast.parse(OPTIONS.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainerOptions"
    ]
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    free = [f"``{node.target.id}``" for node in fields if any(word.arg == "decides" for word in node.value.keywords)]
    listed = f"{', '.join(free[:-1])} and {free[-1]}"
    entries = []
    for node in fields:
        default, _, meaning = node.value.args
        text = " ".join(ast.literal_eval(meaning).split()).replace("{free}", listed)
        entries.append((node.target.id, ast.unparse(node.annotation), ast.unparse(default), text))
    return entries


class Readable(griffe.Extension):
    """Applies ``readable`` to every docstring, and writes the MetaTrainer's options out."""

    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring:
            entries = [f"    {name}: {meaning}" for name, _, _, meaning in trainer_options()]
            obj.docstring.value = readable(obj.docstring.value.replace("    {options}", "\n".join(entries)))
        if obj.path.endswith("MetaTrainer.__init__"):
            del obj.parameters["options"]
            for name, annotation, default, _ in trainer_options():
                kind = griffe.ParameterKind.keyword_only
                obj.parameters.add(griffe.Parameter(name, annotation=annotation, kind=kind, default=default))
