#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the errors of float against double on the sample bundles, and prints the table of docs/numerics.md.

error_table.py GDN_RUN [--limit X]    fails if an error of float exceeds X
"""
import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/cli"))
from bundles import read  # noqa: E402

GROUPS = {
    "outputs": lambda n: n in ("output", "decode.output"),
    "final states": lambda n: n.endswith(("recurrent_state", "conv_state")),
    "gradient of the input": lambda n: n == "grad.hidden_states",
    "gradients of initial states": lambda n: n in ("grad.initial_state", "grad.initial_conv_state"),
    "gradients of the projections": lambda n: n.startswith("grad.linear_attn.") and "proj" in n,
    "gradient of `conv1d`": lambda n: n == "grad.linear_attn.conv1d.weight",
    "gradients of `A_log`, `dt_bias`": lambda n: n in ("grad.linear_attn.A_log", "grad.linear_attn.dt_bias"),
    "gradient of `norm`": lambda n: n == "grad.linear_attn.norm.weight",
}
EXACT = ["--dtype", "f64", "--rule", "recurrent"]
COLUMNS = {
    "float, chunked, 1 rank": [],
    "float, chunked, 4 ranks": ["--ranks", "4", "--share", "prefix-scan"],
    "float, recurrent, 1 rank": ["--rule", "recurrent"],
    "double, chunked, 4 ranks": ["--dtype", "f64", "--ranks", "4", "--share", "prefix-scan"],
}


def results(program, bundle, options, folder):
    out = Path(folder) / "out"
    subprocess.run([program, "--out", out, "--tolerance", "1", *options, bundle], check=True, capture_output=True)
    return {name: t.values for name, t in read(out)[1].items()}


def error(got, want):
    size = math.fsum(w * w for w in want)
    difference = math.fsum((g - w) ** 2 for g, w in zip(got, want, strict=True))
    return 0.0 if difference == 0 else math.sqrt(difference / size) if size else math.inf


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("program")
    arguments.add_argument("--limit", type=float)
    given = arguments.parse_args()

    worst = {group: dict.fromkeys([*COLUMNS, "the peer"], 0.0) for group in GROUPS}

    def note(column, got, want):
        for name, values in want.items():
            for group, holds in GROUPS.items():
                if name in got and holds(name):
                    worst[group][column] = max(worst[group][column], error(got[name], values))

    with tempfile.TemporaryDirectory() as folder:
        for bundle in sorted((ROOT / "tests/data").glob("*.safetensors")):
            exact = results(given.program, bundle, EXACT, folder)
            for column, options in COLUMNS.items():
                note(column, results(given.program, bundle, options, folder), exact)
            if not bundle.name.startswith("exact_"):
                expected = {n.removeprefix("expected."): t.values for n, t in read(bundle)[1].items()}
                note("the peer", expected, exact)

    print("| rms(error) / rms(value), the largest of all bundles |", " | ".join([*COLUMNS, "the peer"]), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for group, row in worst.items():
        print(f"| {group} |", " | ".join(f"{e:.1e}" for e in row.values()), "|")
    if given.limit is not None:
        largest = max(e for row in worst.values() for column, e in row.items() if column.startswith("float"))
        if not largest <= given.limit:
            sys.exit(f"an error of float is {largest:.2e}, above {given.limit:.0e}")


main()
