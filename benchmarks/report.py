#!/usr/bin/env python3
"""Tables and a plot from the JSON file that benchmarks/linear.py writes."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peers.peer import FAMILIES

QUANTAL = "quantal"
FLOAT_REFERENCES = ("torch_float/fp32", "torch_float/fp32-prepacked", "torch_float/bf16-prepacked")
PLOT_BASELINE = "torch_float/fp32"
FEW_TOKENS = 8  # up to here reading the weight takes the time: bandwidth is shown

# Rows of the plot: families that store the weight in as many bits.
BITS = {"8 bits": ("w8", "fp8", "w8a8"), "4 bits": ("w4", "w4a8"), "2 bits": ("w2", "w2a8")}

Result = dict[str, Any]


class Results:
    """What was measured, by shape, tokens and scheme."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.by_key: dict[tuple[int, int, int, str], Result] = {}
        for result in document["results"]:
            self.by_key[self._key(result)] = result
        results = document["results"]
        self.shapes = list(dict.fromkeys((r["rows"], r["columns"]) for r in results))
        self.tokens = sorted({r["tokens"] for r in results})

    @staticmethod
    def name(result: Result) -> str:
        """PEER/SCHEME."""
        return f"{result['peer']}/{result['scheme']}"

    def _key(self, result: Result) -> tuple[int, int, int, str]:
        return result["rows"], result["columns"], result["tokens"], self.name(result)

    def get(self, shape: tuple[int, int], tokens: int, name: str) -> Result | None:
        """One result, if it was measured."""
        return self.by_key.get((*shape, tokens, name))

    def at(self, shape: tuple[int, int], tokens: int | None = None) -> list[Result]:
        """All results of a shape, or of a shape and a number of tokens."""
        return [
            r
            for r in self.document["results"]
            if (r["rows"], r["columns"]) == shape and tokens in (None, r["tokens"])
        ]

    def names(self, shape: tuple[int, int], families: Iterable[str] = FAMILIES) -> list[str]:
        """The schemes of a shape in so many families, family by family."""
        found = {self.name(r): r["family"] for r in self.at(shape) if r["family"] in families}
        return sorted(found, key=lambda n: (FAMILIES.index(found[n]), n))

    def best_peer(self, shape: tuple[int, int], tokens: int, family: str) -> Result | None:
        """The fastest of a family that is not Quantal's."""
        peers = [
            r for r in self.at(shape, tokens) if r["family"] == family and r["peer"] != QUANTAL
        ]
        return min(peers, key=lambda r: r["ms"], default=None)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def time_cell(result: Result | None) -> str:
    """Milliseconds, and the rate that bounds them."""
    if result is None:
        return "-"
    few = result["tokens"] <= FEW_TOKENS
    rate = f"{result['gbps']:.0f} GB/s" if few else f"{result['gflops']:.0f} GF"
    mark = "" if result["held"] else " †"
    return f"{result['ms']:.3f} ({rate}){mark}"


def times(results: Results, shape: tuple[int, int]) -> list[str]:
    """Every scheme of a shape."""
    rows = []
    for name in results.names(shape):
        cells = [results.get(shape, tokens, name) for tokens in results.tokens]
        family = next(r["family"] for r in cells if r is not None)
        shown = f"**{name}**" if name.startswith(QUANTAL) else name
        rows.append([family, shown, *map(time_cell, cells)])
    return table(["family", "layer", *(f"M={m}, ms" for m in results.tokens)], rows)


def ratio(other: Result | None, own: Result | None) -> str:
    """How many times as fast `own` is."""
    return "-" if own is None or other is None else f"{other['ms'] / own['ms']:.2f}"


def ratios(results: Results, shape: tuple[int, int]) -> list[str]:
    """How many times as fast Quantal is as the best peer of its family, and as float layers."""
    rows = []
    for name in (n for n in results.names(shape) if n.startswith(QUANTAL)):
        for tokens in results.tokens:
            own = results.get(shape, tokens, name)
            if own is None:
                continue
            best = results.best_peer(shape, tokens, own["family"])
            floats = [ratio(results.get(shape, tokens, f), own) for f in FLOAT_REFERENCES]
            versus_best = "-" if best is None else f"{ratio(best, own)} of {results.name(best)}"
            rows.append([name, str(tokens), versus_best, *floats])
    if not rows:
        return []
    return table(["Quantal", "M", "best peer of its family", *FLOAT_REFERENCES], rows)


def limit_lines(document: dict[str, Any]) -> list[str]:
    """What the machine can do at most, before and after."""
    if not document["limits"]:
        return []
    reads = " and ".join(f"{run['read_gbps']:.1f}" for run in document["limits"])
    lines = [f"Reading memory: {reads} GB/s at most (before and after).", ""]
    first = document["limits"][0]
    peaks = [p for p in first["peaks"] if p["threads"] == first["threads"]]
    lines += table(
        [f"peak of {first['threads']} threads", "", "unit"],
        [[peak["name"], f"{peak['giga']:.0f}", peak["unit"]] for peak in peaks],
    )
    return lines


def markdown(results: Results) -> str:
    """The whole report."""
    document = results.document
    machine, settings = document["machine"], document["settings"]
    lines = [
        "# Linear layers on the CPU",
        "",
        f"`{settings['command']}`, {document['date']}, commit {machine['commit']}: "
        f"{machine['cpu']} (family {machine['family']}, model {machine['model']}; "
        f"{', '.join(machine['flags'])}), {settings['threads']} threads, "
        f"instruction sets: {settings['isa']}.",
        "",
        "Versions: " + ", ".join(dict.fromkeys(document["versions"].values())) + ".",
        "",
        "Times are the least of the rounds' medians. M is the number of tokens. w4: 4-bit weights, "
        "float activations; w4a8: int8 activations, quantized in the time shown.",
        "",
        *limit_lines(document),
    ]
    for shape in results.shapes:
        lines += [f"## N={shape[0]}, K={shape[1]}", "", *times(results, shape)]
        compared = ratios(results, shape)
        if compared:
            lines += ["How many times as fast as:", "", *compared]
    lines += [f"† {why}" for why in document["not_held"].values()]
    if document["skipped"]:
        lines += ["## Left out", "", *(f"* {line}" for line in document["skipped"])]
    return "\n".join(lines).rstrip() + "\n"


def plot(results: Results, path: Path) -> None:
    """Speed over torch's fp32 layer, a panel for each width and shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    widths = [bits for bits in BITS if any(results.names(s, BITS[bits]) for s in results.shapes)]
    if not widths:
        return
    figure, panels = pyplot.subplots(
        len(widths),
        len(results.shapes),
        figsize=(4 * len(results.shapes) + 3, 3.4 * len(widths)),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    positions = range(len(results.tokens))
    for row, bits in enumerate(widths):
        shown = dict.fromkeys(n for s in results.shapes for n in results.names(s, BITS[bits]))
        # Quantal has one colour and thick lines; the others share the rest of the map.
        others = [name for name in shown if not name.startswith(QUANTAL)]
        colors = {name: pyplot.get_cmap("tab20")(i % 20) for i, name in enumerate(others)}
        own = [name for name in shown if name.startswith(QUANTAL)]
        styles = dict(zip(own, ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 3))), strict=False))
        for column, shape in enumerate(results.shapes):
            panel = panels[row][column]
            for name in shown:
                pairs = [
                    (results.get(shape, m, PLOT_BASELINE), results.get(shape, m, name))
                    for m in results.tokens
                ]
                speed = [b["ms"] / r["ms"] if b and r else float("nan") for b, r in pairs]
                mine = name in own
                panel.plot(
                    positions,
                    speed,
                    label=name,
                    color="black" if mine else colors[name],
                    linestyle=styles.get(name, "-"),
                    linewidth=2.2 if mine else 1.2,
                    marker="o" if mine else ".",
                )
            panel.set_yscale("log", base=2)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.set_xticks(list(positions), [str(m) for m in results.tokens])
            panel.grid(alpha=0.3)
            panel.axhline(1, color="gray", linewidth=0.8)
            if row == 0:
                panel.set_title(f"N={shape[0]}, K={shape[1]}")
            if row == len(widths) - 1:
                panel.set_xlabel("tokens")
            if column == 0:
                panel.set_ylabel(f"{bits}: times as fast as\n{PLOT_BASELINE}")
        panels[row][-1].legend(
            loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=7, handlelength=4
        )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def save(document: dict[str, Any], text: str, folder: Path, stem: str) -> None:
    """Writes STEM.json and STEM.md, and prints the text."""
    (folder / f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(text)
    print(text)


def write(path: Path) -> int:
    """Writes FILE.md and FILE.png beside FILE.json."""
    results = Results(json.loads(path.read_text()))
    text = markdown(results)
    path.with_suffix(".md").write_text(text)
    print(text)
    written = [path, path.with_suffix(".md")]
    try:
        plot(results, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    except ImportError as error:
        print(f"no plot: {error}", file=sys.stderr)
    print("wrote", *(str(file) for file in written))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="build/bench-results/linear-native.json")
    sys.exit(write(parser.parse_args().file))
