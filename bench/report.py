"""Tables, a picture and a trimmed result file from pytest-benchmark's JSON.

    python bench/report.py benchmark.json [another.json ...] [--out FOLDER]

Writes summary.md (the README's table), tables.md (every row), steps.png and a JSON of what matters, named by date,
kernels and commit; prints the summary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from l2l_fast.files import write_text

HERE = Path(__file__).resolve().parent
KINDS = ("step", "step in a graph", "training-step", "meta-gradient", "meta-update", "overhead", "memory")
STATISTICS = ("median", "mean", "q1", "q3", "iqr", "min", "rounds")

# The summary's columns, and the rows of each kind that stand for them.
RIVALS = {
    "nn.LSTMCell": ("nn.LSTMCell", "autograd, nn.LSTMCell"),
    "nn.LSTM": ("nn.LSTM",),
    "torch.compile": ("torch.compile", "autograd, torch.compile"),
    "max-autotune": ("torch.compile max-autotune",),
    "Adam fused": ("Adam fused",),
}
# The picture's lines, in Okabe and Ito's colours; ours are bold, those that come near another broken.
LINES = {
    "ours": ("#D55E00", "o", "-"),
    "ours bf16 state": ("#000000", "s", (0, (4, 2))),
    "nn.LSTMCell": ("#0072B2", "^", "-"),
    "nn.LSTM": ("#009E73", "v", "-"),
    "torch.compile": ("#CC79A7", "D", "-"),
    "Adam loop": ("#E69F00", "x", "--"),
    "Adam fused": ("#56B4E9", "+", "--"),
}


# ---------------------------------------------------------------- the result file


def trim(raw: dict) -> dict:
    """What matters of a pytest-benchmark JSON: where it ran, and one flat dictionary a row. A trimmed one stays."""
    if "rows" in raw:
        return raw
    commit = raw.get("commit_info", {})
    environment = {**raw["environment"], "commit": commit.get("id"), "uncommitted_changes": commit.get("dirty")}
    rows = [
        {**bench["extra_info"], **{name: bench["stats"][name] for name in STATISTICS}} for bench in raw["benchmarks"]
    ]
    return {"environment": {**environment, "date": raw["datetime"][:10]}, "rows": rows}


def joined(runs: list[dict]) -> dict:
    """Several trimmed runs as if they had been one, with the first one's environment; the last to have a row counts."""
    commands = [run["environment"]["command"] for run in runs]
    rows = {(row["kind"], row["case"], row["way"], row.get("threads")): row for run in runs for row in run["rows"]}
    return {
        "environment": {**runs[0]["environment"], "command": "; ".join(commands)},
        "rows": sorted(rows.values(), key=lambda row: KINDS.index(row["kind"])),
    }


def result_name(result: dict) -> str:
    environment = result["environment"]
    words = [environment["date"], environment["kernels"].replace(" ", "-"), (environment["commit"] or "unknown")[:10]]
    return "-".join(words) + ".json"


# ---------------------------------------------------------------- tables


def summary(result: dict) -> str:
    """One line a case: our time, and each rival's time over ours."""
    rows = [row for row in result["rows"] if row["kind"] not in ("overhead", "memory")]
    lines, limits = [], []
    columns = {name: ways for name, ways in RIVALS.items() if any(row["way"] in ways for row in rows)}
    for case in _unique(_case(row) for row in rows):
        here = [row for row in rows if _case(row) == case]
        ours = next((row for row in here if row["way"] == "ours"), None)
        if ours is None:
            continue
        limits += _limit(case, ours, here)
        cells = [case, seconds(ours["median"]), _share(ours), _fma(ours)]
        for names in columns.values():
            cells.append(next((_times(row["times_ours"]) for row in here if row["way"] in names), ""))
        lines.append(cells)
    text = [_table(["case", "ours", "of ceiling", "FMA", *columns], lines)]
    text += ["", "A rival's column is its time over ours, measured in turn with ours: above 1 it is the slower.", ""]
    text += [*limits, ""]
    return "\n".join([*text, *_findings(result["rows"]), "", _where(result["environment"])])


def _limit(case: str, ours: dict, here: list[dict]) -> Iterable[str]:
    """What no kernel reaches on this machine: the multiply-adds alone, at the rate that registers allow."""
    for row in here:
        if row["way"] in RIVALS["nn.LSTMCell"] and "share_of_fma" in ours:
            most = row["times_ours"] / ours["share_of_fma"]
            yield f"- {case}: more than {most:.1f}x nn.LSTMCell is out of this machine's reach"


def _findings(rows: list[dict]) -> Iterable[str]:
    """The comparisons that are no column: our own variants, threads, overhead, memory."""
    for threads in sorted({row["threads"] for row in rows if row["kind"] == "step" and row["case"] == "1M"}):
        for way in ("ours bf16 state", "ours moments"):
            for row in _select(rows, kind="step", case="1M", way=way, threads=threads):
                yield f"- 1M, threads {threads}: {way} takes {row['times_ours']:.2f} of ours"
        for row in _select(rows, kind="step", case="1M", way="ours bf16 products", threads=threads):
            yield (
                f"- 1M, threads {threads}: products in bfloat16 ({row['isa']}) are {1 / row['times_ours']:.2f} times "
                f"as fast as ours,\n  within {row['error_to_float64']:.1e} of float64"
            )
    by_threads = {row["threads"]: row["median"] for row in _select(rows, kind="step", case="1M", way="ours")}
    if 1 in by_threads and len(by_threads) > 1:
        most = max(by_threads)
        yield f"- 1M: {most} threads are {by_threads[1] / by_threads[most]:.2f} times as fast as one"
    for case in ("1M", "10M"):
        for way in ("ours", "ours bf16 state", "ours moments"):
            for row in _select(rows, kind="step", case=case, way=way):
                if "tf32_flops" in row:
                    rate = row["share_of_copy"] * row["copy_bytes_per_second"] / 1e9
                    yield f"- {case}: {way} moves {rate:,.0f} GB/s, {row['share_of_copy']:.0%} of the copy rate"
    for row in _select(rows, kind="meta-update", way="ours"):
        yield f"- 10,000 meta-updates of {row['case']}: {seconds(1e4 * row['mean'])}"
    for row in _select(rows, kind="overhead"):
        if "overhead_seconds" in row:
            yield f"- 16k in four tensors: step() takes {seconds(row['overhead_seconds'])} more than the op alone"
        else:
            yield f"- step() of four empty tensors, all but the arithmetic: {seconds(row['median'])}"
    memory = {row["way"]: row["peak_extra_bytes_per_coordinate"] for row in _select(rows, kind="memory")}
    if len(memory) == 2 and memory["ours"] > 0:
        yield (
            f"- meta-gradient's extra memory, unroll 20: {memory['ours']:,.0f} bytes a coordinate, autograd "
            f"{memory['autograd']:,.0f} ({memory['autograd'] / memory['ours']:.0f} times as much)"
        )


def tables(result: dict) -> str:
    """Every row."""
    parts, rows = [_where(result["environment"]), ""], result["rows"]
    header = ["way", "median", "iqr", "Mcoord/s", "bytes", "mul-adds", "of ceiling", "FMA", "time/ours", "memory"]
    for case in _unique(_case(row) for row in rows):
        lines = []
        for row in (row for row in rows if _case(row) == case):
            memory = row.get("peak_extra_bytes", row.get("state_bytes"))
            lines.append([
                row["way"], seconds(row["median"]), seconds(row["iqr"]),
                f"{row['coordinates_per_second'] / 1e6:.4g}" if row.get("coordinates_per_second") else "",
                f"{row['bytes']:.0f}" if "bytes" in row else "",
                f"{row['multiply_adds']:.0f}" if row.get("multiply_adds") else "", _share(row), _fma(row),
                _times(row["times_ours"]) if "times_ours" in row else "",
                f"{memory / 2**20:.4g} MiB" if memory is not None else "",
            ])  # fmt: skip
        used = [index for index in range(len(header)) if index < 2 or any(line[index] for line in lines)]
        parts += [f"### {case}", "", _table([header[i] for i in used], [[line[i] for i in used] for line in lines]), ""]
    parts.append(
        "Bytes and multiply-adds are what a coordinate (in meta-training: a coordinate and step) must cost. The\n"
        "ceiling is the slower of moving the bytes at the copy rate and doing the arithmetic at the sgemm rate.\n"
        "FMA: the share of the float32 multiply-adds that registers alone allow, which no sgemm passes.\n"
        "Small cases live in cache and may pass the copy rate."
    )
    return "\n".join(parts)


def _where(environment: dict) -> str:
    commit = (environment["commit"] or "unknown")[:10] + (" with changes" if environment["uncommitted_changes"] else "")
    gpu = f"{environment['gpu']}, driver {environment['driver']}; " if "gpu" in environment else ""
    return (
        f"{gpu}{environment['cpu']}, {environment['cores']} cores, threads {environment['threads']}, kernels: "
        f"{environment['kernels']}, torch {environment['torch']},\ncommit {commit}, {environment['date']}:\n"
        f"`{environment['command']}`"
    )


def _machine(environment: dict) -> str:
    return environment.get("gpu") or f"{environment['cpu']}, threads {environment['threads']}"


def _case(row: dict) -> str:
    threads = f", {row['threads']} thread{'s' if row['threads'] > 1 else ''}" if row["kind"] == "step" else ""
    return f"{row['kind']}, {row['case']}{threads}"


def _select(rows: list[dict], **wanted) -> list[dict]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _share(row: dict) -> str:
    return f"{row['share_of_ceiling']:.0%} {row['limit']}" if "share_of_ceiling" in row else ""


def _fma(row: dict) -> str:
    return f"{row['share_of_fma']:.0%}" if "share_of_fma" in row else ""


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio >= 1 else f"{ratio:.2g}x"


def seconds(value: float) -> str:
    """With its unit, in three digits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _table(header: list[str], lines: list[list[str]]) -> str:
    """Markdown that is also aligned for a terminal."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]

    def draw(line: list[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([draw(header), rule, *map(draw, lines)])


# ---------------------------------------------------------------- the picture


def picture(result: dict, path: Path) -> bool:
    """Time against coordinates on logarithmic axes; False where there are not two sizes to draw."""
    threads = result["environment"]["threads"]
    # One or four tensors; the list of two hundred is another subject.
    rows = [row for row in _select(result["rows"], kind="step", threads=threads) if row["case"] != "resnet"]
    if len({row["coordinates"] for row in rows}) < 2:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for way, (color, marker, dash) in LINES.items():
        here = sorted(_select(rows, way=way), key=lambda row: row["coordinates"])
        if not here:
            continue
        middle = [row["median"] for row in here]
        spread = [[row["median"] - row["q1"] for row in here], [row["q3"] - row["median"] for row in here]]
        axes.errorbar(
            [row["coordinates"] for row in here], middle, yerr=spread, label=way, color=color, marker=marker,
            linestyle=dash, linewidth=2.6 if way.startswith("ours") else 1.5, markersize=6, capsize=3,
            zorder=4 if way.startswith("ours") else 3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis, form in ((axes.xaxis, _number), (axes.yaxis, seconds)):
        axis.set_major_locator(LogLocator(base=10, numticks=15))
        axis.set_major_formatter(FuncFormatter(lambda value, _, form=form: form(value)))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("coordinates (parameters of the optimizee)")
    axes.set_ylabel("time of one optimizer step")
    environment = result["environment"]
    axes.set_title(
        f"One optimizer step, paper network (2 x 20)\n{_machine(environment)}, "
        f"torch {environment['torch']}, kernels: {environment['kernels']}",
        fontsize=10,
    )  # fmt: skip
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(title="median, bars: quartiles", frameon=False, fontsize=9, loc="outside right upper")
    figure.savefig(path)
    return True


def _number(value: float) -> str:
    for name, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"


# ---------------------------------------------------------------- the command


def write(result: dict, out: Path) -> None:
    """All files into ``out``, of a result as :func:`joined` gives it."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "summary.md", summary(result) + "\n")
    write_text(out / "tables.md", tables(result) + "\n")
    write_text(out / result_name(result), json.dumps(result, indent=1) + "\n")
    picture(result, out / "steps.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+", help="what --benchmark-json or this wrote, of one machine")
    parser.add_argument("--out", type=Path, default=HERE.parent / "runs", help="folder (default: runs)")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.json if path.stat().st_size]
    result = joined([trim(run) for run in runs])
    write(result, arguments.out)
    print(summary(result))


if __name__ == "__main__":
    main()
