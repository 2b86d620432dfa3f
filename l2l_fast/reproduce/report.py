"""Rows as Markdown tables, and as one HTML page with its pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from l2l_fast.reproduce.figures import Entry, Findings, bar, verdict
from l2l_fast.reproduce.rows import METRICS

PROTOCOL = (
    "Ratios below 1 favour the learned optimizer. They are to the best of SGD, Nesterov, RMSprop and Adam, each at a "
    "constant rate tuned for that horizon and that measure on seeds of its own; all run from the same starts on the "
    "same minibatches of the held-out half of the data. Steps: to the best baseline's smoothed loss at the horizon, "
    "over its own; seconds: those steps in wall-clock time. ± is the standard error over the held-out seeds."
)
BARS = "Bars are those for MNIST."


def markdown(all_findings: Sequence[Findings]) -> str:
    """A section a row, with a table each."""
    return "\n\n".join(_markdown_row(findings) for findings in all_findings) + "\n"


def html(all_findings: Sequence[Findings], folder: Path, command: str) -> str:
    """One page that needs no other file: pictures are read from ``folder/ROW`` and stand in it as base64."""
    summary = "".join(
        f'<tr><td class="name"><a href="#{escape(findings.row)}">{escape(findings.row)}</a></td>'
        f"<td>{escape(findings.title)}</td><td>{_score(findings)}</td></tr>"
        for findings in all_findings
    )
    first = all_findings[0]
    facts = " · ".join(f"{escape(name)} {escape(str(value))}" for name, value in first.environment.items())
    sections = "\n".join(_html_row(findings, folder / findings.row) for findings in all_findings)
    return _PAGE.format(
        title=f"Learned optimizers on {escape(first.dataset)}", protocol=escape(f"{PROTOCOL} {BARS}"), facts=facts,
        command=escape(command), summary=summary, sections=sections,
    )  # fmt: skip


def _markdown_row(findings: Findings) -> str:
    metrics = _metrics(findings)
    lines = [f"### {findings.title}", "", findings.question, "", f"    {findings.command}", ""]
    lines.append("| " + " | ".join(["case", "network", *(METRICS[metric] for metric in metrics), "against"]) + " |")
    lines.append("|" + "---|" * (len(metrics) + 3))
    for entry in findings.entries:
        label, rivals = entry.label, entry.rivals
        for name, cells in _cells(findings, entry, metrics):
            texts = [f"{value} ({limit}, {word})" if word else value for value, limit, word in cells]
            lines.append("| " + " | ".join([label, name, *texts, rivals]) + " |")
            label = rivals = ""  # once a case
    if findings.judged():
        lines += ["", f"{_score(findings)} ({findings.seeds} held-out seeds)."]
    return "\n".join(lines)


def _html_row(findings: Findings, folder: Path) -> str:
    metrics = _metrics(findings)
    heads = "".join(f"<th>{escape(METRICS[metric])}</th>" for metric in metrics)
    body = []
    for entry in findings.entries:
        lines = _cells(findings, entry, metrics)
        for k, (name, cells) in enumerate(lines):
            first = f'<td class="name" rowspan="{len(lines)}">{escape(entry.label)}</td>' if k == 0 else ""
            texts = "".join(
                f'<td class="{word}">{value}'
                + (f'<span class="bar"> {escape(limit)} {word}</span>' if word else "")
                + "</td>"
                for value, limit, word in cells
            )
            last = f'<td rowspan="{len(lines)}">{escape(entry.rivals)}</td>' if k == 0 else ""
            body.append(f'<tr>{first}<td class="name">{escape(name)}</td>{texts}{last}</tr>')
    pictures = "".join(
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{_embedded(folder / name)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for name, caption in findings.pictures.items()
    )
    return _SECTION.format(
        row=escape(findings.row), title=escape(findings.title), question=escape(findings.question), heads=heads,
        body="\n".join(body), score=_score(findings), seeds=findings.seeds, pictures=pictures,
    )  # fmt: skip


def _cells(findings: Findings, entry: Entry, metrics: list[str]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Lines (network, cells (figure, bar, verdict)); the last line is the one that is judged."""
    lines = [(name, dict(zip(entry.metrics, values, strict=True))) for name, values in findings.lines(entry)]
    return [
        (
            name,
            [
                (figures[metric], bar(entry, metric), verdict(entry.met(metric)) if k == 1 else "")
                if metric in figures
                else ("", "", "")
                for metric in metrics
            ],
        )
        for k, (name, figures) in enumerate(lines, start=2 - len(lines))
    ]


def _metrics(findings: Findings) -> list[str]:
    return [metric for metric in METRICS if any(metric in entry.metrics for entry in findings.entries)]


def _score(findings: Findings) -> str:
    judged = findings.judged()
    return f"{sum(judged)} of {len(judged)} bars met" if judged else "no bars"


def _embedded(path: Path) -> str:
    from PIL import Image  # matplotlib, which drew the picture, needs it as well

    content = io.BytesIO()  # a quarter of the size, and no difference to be seen
    Image.open(path).convert("RGB").quantize(128).save(content, "png", optimize=True)
    return base64.b64encode(content.getvalue()).decode()


_SECTION = """<section id="{row}">
<h2>{title}</h2>
<p>{question} <b>{score}</b>, {seeds} held-out seeds.</p>
<table><thead><tr><th>case</th><th>network</th>{heads}<th>against</th></tr></thead>
<tbody>
{body}
</tbody></table>
{pictures}
</section>"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
table {{ display: block; overflow-x: auto; }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right; vertical-align: top; }}
th {{ font-weight: 600; }}
th:first-child, th:nth-child(2), td.name {{ text-align: left; }}
td.met {{ background: #e4f3e8; }}
td.missed {{ background: #fbe3dc; }}
span.bar {{ color: #555; font-size: .8em; white-space: nowrap; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; }}
figcaption, .facts {{ color: #555; font-size: .9em; }}
code {{ background: #f3f3f3; padding: .1rem .3rem; overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p><code>{command}</code></p>
<p>{protocol}</p>
<p class="facts">{facts}</p>
<table><thead><tr><th>row</th><th>what</th><th>bars</th></tr></thead><tbody>{summary}</tbody></table>
{sections}
</body>
</html>
"""
