"""What mkdocs cannot do by itself: pages from outside docs/, mathematics without a script, wide tables.

- A link that leaves docs/ is one to a page as well: what it leads to is added below source/, Markdown as it is, code in
  a block, and its own links are followed likewise. README.md is the first page.
- Equations become MathML when the site is built, so that no reader's browser has to fetch a renderer.
"""

import os
import re
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FRONT = "README.md"
LANGUAGES = {
    ".py": "python", ".sh": "sh", ".json": "json", ".ipynb": "json", ".cu": "cuda", ".h": "cpp", ".cuh": "cpp",
    "": "text",
}  # fmt: skip
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^```.*?^```$|^ {4}.*?$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def place_of(path: str) -> str:
    """Where a file of the repository, named from its root, stands among the site's sources."""
    if path == FRONT:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" + ("" if path.endswith((".md", ".png")) else ".md")


def origin_of(place: str) -> str:
    """The file of the repository that stands at a place among the site's sources."""
    if place == "index.md":
        return FRONT
    if not place.startswith("source/"):
        return f"docs/{place}"
    path = place.removeprefix("source/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def target_of(link: str, origin: str) -> tuple[str, str] | None:
    """The file that a link leads to, named from the root, and the anchor in it; None where it leaves the repository."""
    path, _, anchor = link.partition("#")
    if "://" in link or link.startswith(("mailto:", "/")) or not path:
        return None
    target = os.path.normpath(PurePosixPath(origin).parent / path)
    return (target, anchor) if (ROOT / target).is_file() and not target.startswith("..") else None


def text_of(path: str) -> str:
    """A file of the repository as Markdown."""
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n```\n"


def links_of(text: str) -> list[str]:
    return [found[2] for found in LINK.finditer(CODE.sub("", text))]


def on_files(files: Files, config) -> Files:
    """Add the README, and whatever links lead to outside docs/."""
    pages = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    waiting, seen = [*pages, FRONT, *map(origin_of, _named(config["nav"]))], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(place_of(path)) is None:
            if path.endswith(".png"):
                files.append(File.generated(config, place_of(path), content=(ROOT / path).read_bytes()))
                continue
            files.append(File.generated(config, place_of(path), content=text_of(path)))
        if path.endswith(".md"):
            found = [target_of(link, path) for link in links_of((ROOT / path).read_text())]
            waiting += [target for target, _ in filter(None, found)]
    return files


def _named(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [path for part in (nav.values() if isinstance(nav, dict) else nav) for path in _named(part)]


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    origin = origin_of(here)

    def moved(found: re.Match) -> str:
        target = target_of(found[2], origin)
        if target is None:
            return found[0]
        place = os.path.relpath(place_of(target[0]), PurePosixPath(here).parent)
        return f"{found[1]}{place}{'#' if target[1] else ''}{target[1]}{found[3]}"

    parts = CODE.split(markdown)
    return "".join(part if index % 2 else LINK.sub(moved, part) for index, part in enumerate(parts))


def on_page_content(html: str, page, config, files) -> str:
    """Render equations, and let wide tables scroll by themselves."""
    html = re.sub(
        r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>',
        lambda found: _mathml(found[2], "block" if found[1] == "div" else "inline"),
        html,
        flags=re.DOTALL,
    )
    return html.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


def _mathml(latex: str, display: str) -> str:
    plain = latex.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    mathml = convert(plain.strip(), display=display)
    return f'<div class="equation">{mathml}</div>' if display == "block" else mathml
