#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws the figures of the documentation, beside this file: figures.py [--check]

With --check it writes nothing, and fails if a figure is not what it would draw.
"""
import sys
from pathlib import Path

RANKS = 4
CHUNKS = 2 * RANKS
COLOURS = ["#f2c572", "#9ccbe8", "#8fd1b5", "#dcaecb"]  # of the rank that holds a chunk in the caller's layout
INK, GREY = "#222222", "#777777"
CHUNK_W, CHUNK_H = 52, 34


def zigzag_rank(chunk):
    return chunk if chunk < RANKS else CHUNKS - 1 - chunk


class Drawing:
    def __init__(self, width, height, title):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="14">',
            f"<title>{title}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def text(self, x, y, text, anchor="middle", size=14, colour=INK, weight="normal"):
        self.lines.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
                          f'font-weight="{weight}">{text}</text>')

    def chunk(self, x, y, n):
        self.lines.append(f'<rect x="{x}" y="{y}" width="{CHUNK_W}" height="{CHUNK_H}" fill="{COLOURS[zigzag_rank(n)]}" '
                          f'stroke="{INK}"/>')
        self.text(x + CHUNK_W / 2, y + CHUNK_H / 2 + 5, n)

    def curve(self, x0, y0, x1, y1, colour):
        half = (x0 + x1) / 2
        self.lines.append(f'<path d="M{x0},{y0} C{half},{y0} {half},{y1} {x1},{y1}" fill="none" stroke="{colour}" '
                          'stroke-width="2"/>')

    def arrow(self, x0, y0, x1, y1):
        self.lines.append(f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y1}" stroke="{INK}" stroke-width="1.5" '
                          'marker-end="url(#tip)"/>')

    def finish(self):
        return "\n".join([*self.lines, "</svg>"]) + "\n"


def zigzag():
    d = Drawing(860, 400, "Zigzag over four ranks: undo, the state chain, redo")
    d.text(232, 32, "the sequence, in 8 chunks", "end")
    for n in range(CHUNKS):
        d.chunk(250 + n * CHUNK_W, 10, n)

    left, right, top, step = 80, 440, 118, 66
    d.text(left + CHUNK_W, top - 34, "the caller's layout: zigzag", weight="bold")
    d.text(right + CHUNK_W, top - 34, "the order of computation", weight="bold")
    d.text((left + 2 * CHUNK_W + right) / 2, top - 16, "undo &#8594;   &#8592; redo", colour=GREY)
    for rank in range(RANKS):
        y = top + rank * step
        d.text(left - 14, y + 22, f"rank {rank}", "end")
        for slot, n in enumerate((rank, CHUNKS - 1 - rank)):
            d.chunk(left + slot * CHUNK_W, y, n)
            to_rank, to_slot = divmod(n, 2)
            # Chunks leave from the right edge of their rank and arrive at the left edge of the other.
            d.curve(left + 2 * CHUNK_W, y + CHUNK_H * (1 + 2 * slot) / 4, right,
                    top + to_rank * step + CHUNK_H * (1 + 2 * to_slot) / 4, COLOURS[rank])
        for slot in range(2):
            d.chunk(right + slot * CHUNK_W, y, 2 * rank + slot)
    publishes = ["publishes E&#8320;, its state", "publishes (M&#8321;, E&#8321;)", "publishes (M&#8322;, E&#8322;)",
                 "publishes nothing"]
    starts = ["starts from 0, or a given state", "starts from E&#8320;", "starts from M&#8321;E&#8320; + E&#8321;",
              "starts from M&#8322;(M&#8321;E&#8320; + E&#8321;) + E&#8322;"]
    for rank in range(RANKS):
        y = top + rank * step
        d.text(right + 2 * CHUNK_W + 20, y + 14, starts[rank], "start")
        d.text(right + 2 * CHUNK_W + 20, y + 32, publishes[rank], "start", colour=GREY)
        if rank + 1 < RANKS:
            d.arrow(right + CHUNK_W / 2, y + CHUNK_H + 2, right + CHUNK_W / 2, y + step - 3)
            d.text(right + CHUNK_W / 2 + 10, y + CHUNK_H + 21, "state, W &#8722; 1 rows", "start", 12, GREY)
    d.text(430, 388, "Colours: the rank that holds a chunk in the caller's layout.", colour=GREY, size=12)
    return d.finish()


FIGURES = {"zigzag.svg": zigzag}

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    stale = [name for name, draw in FIGURES.items()
             if not (folder / name).exists() or (folder / name).read_text() != draw()]
    if "--check" in sys.argv[1:]:
        sys.exit(f"not as figures.py draws them: {', '.join(stale)}" if stale else 0)
    for name in stale:
        (folder / name).write_text(FIGURES[name]())
        print(name)
