#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Turns the JSON of the benchmarks into the tables and the plot of docs/performance.md.

  report.py [--markdown FILE] [--svg FILE] RESULT.json...

A result is what `NAME_bench --benchmark_out=RESULT.json --benchmark_out_format=json --benchmark_repetitions=9` wrote;
of repetitions the median counts. FLOP rates are also given as parts of `eigen_product` in the same file. With
`--markdown`, what stands between `<!-- benchmarks -->` and `<!-- /benchmarks -->` in FILE is replaced; otherwise the
tables are printed. `--svg` draws the floating-point rates of all of them as bars.
"""

import argparse
import json
import os
import re
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("results", nargs="+")
parser.add_argument("--markdown")
parser.add_argument("--svg")
options = parser.parse_args()

YARDSTICK = "eigen_product"
MILLISECONDS = {"ns": 1e-6, "us": 1e-3, "ms": 1, "s": 1e3}


def cpu_model():
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return f"{names[0]}, {os.cpu_count()} cores"
    except (OSError, IndexError):
        return "an unknown CPU"


def rows_of(path):
    """(name without settings of the run, milliseconds, counters) of each benchmark, the median where it was repeated."""
    data = json.loads(Path(path).read_text())
    found = data["benchmarks"]
    medians = [b for b in found if b.get("aggregate_name") == "median"]
    for b in medians or [b for b in found if b.get("run_type") == "iteration"]:
        name = re.sub(r"/(process_time|real_time|repeats:\d+)", "", b.get("run_name", b["name"]))
        wall = "real_time" if "/real_time" in b["name"] else "cpu_time"
        yield name, b[wall] * MILLISECONDS[b["time_unit"]], b


def number(x):
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= size:
            return f"{x / size:.3g} {unit}"
    return f"{x:.3g} "


text, bars = [], []
for path in options.results:
    rows = list(rows_of(path))
    yardstick = next((b.get("FLOP/s") for name, _, b in rows if name.startswith(YARDSTICK)), None)
    text += ["| benchmark | ms | of which each | rate | of Eigen's product |", "|---|---|---|---|---|"]
    for name, ms, b in rows:
        flops, bandwidth = b.get("FLOP/s"), b.get("bytes/s")
        each = f"{b['us/token/head']:.2f} µs per token and value head" if "us/token/head" in b else ""
        each = f"{b['s/fragment'] * 1e9:.0f} ns per fragment" if "s/fragment" in b else each
        rate = f"{number(flops)}FLOP/s" if flops else f"{number(bandwidth)}B/s" if bandwidth else ""
        rate = rate or (f"{number(b['tokens/s'])}tokens/s" if "tokens/s" in b else "")
        part = f"{flops / yardstick:.2f}" if flops and yardstick else ""
        text.append(f"| `{name}` | {ms:.4g} | {each} | {rate} | {part} |")
        if flops and name not in dict(bars):
            bars.append((name, flops))
    text.append("")
table = f"{cpu_model()}\n\n" + "\n".join(text).rstrip() + "\n"

if options.markdown:
    page = Path(options.markdown)
    begin, end = "<!-- benchmarks -->", "<!-- /benchmarks -->"
    before, rest = page.read_text().split(begin)
    page.write_text(before + begin + "\n" + table + end + rest.split(end)[1])
else:
    print(table)

if options.svg:
    width, left, height = 860, 470, 22
    top = max(rate for _, rate in bars)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * len(bars) + 10}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height * len(bars) + 10}" fill="white"/>',
    ]
    for i, (name, rate) in enumerate(bars):
        y, length = 5 + i * height, (width - left - 70) * rate / top
        colour = "#888888" if name.startswith(YARDSTICK) else "#3b6ea5"
        lines.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{name}</text>')
        lines.append(f'<rect x="{left}" y="{y + 3}" width="{length:.0f}" height="{height - 6}" fill="{colour}"/>')
        lines.append(f'<text x="{left + length + 6:.0f}" y="{y + 15}">{rate / 1e9:.0f} GFLOP/s</text>')
    Path(options.svg).write_text("\n".join(lines + ["</svg>"]) + "\n")
