#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Holds the delta rule's error table of docs/numerics.md against what is measured now: rule_error_table.py PROGRAM

Digits depend on the compiler and its instruction set, so a number may be off by a factor of 2.
"""
import subprocess
import sys
from pathlib import Path

FACTOR = 2
PAGE = Path(__file__).resolve().parents[2] / "docs/numerics.md"


def numbers(line):
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return [float(cell) for cell in cells[2:]]


made = subprocess.run([sys.argv[1]], check=True, capture_output=True, text=True).stdout.strip().splitlines()
page = PAGE.read_text().splitlines()
if made[0] not in page:
    sys.exit(f"{PAGE} has no table that begins with {made[0]}")
first = page.index(made[0])
written = page[first : first + len(made)]
wrong = []
for old, new in zip(written[2:], made[2:], strict=True):
    same_row = old.split("|")[1:3] == new.split("|")[1:3]
    if not same_row or any(not b / FACTOR <= a <= b * FACTOR for a, b in zip(numbers(old), numbers(new), strict=True)):
        wrong.append(f"{old}\n  is now\n{new}")
if wrong:
    sys.exit("\n".join(wrong))
print("\n".join(made))
