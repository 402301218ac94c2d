#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""What docs/numerics.md says about equal bits, on the sample bundles: claims_test.py GDN_RUN"""
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/cli"))
from bundles import read  # noqa: E402

PROGRAM = ""
ROWS = ("output", "grad.hidden_states")


def results(bundle, *options, **environment):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([PROGRAM, "--out", f"{folder}/out", "--tolerance", "1", *options,
                        ROOT / f"tests/data/{bundle}.safetensors"], check=True, capture_output=True,
                       env=os.environ | environment)
        return {name: t.bytes() for name, t in read(f"{folder}/out")[1].items()}


def documents(bundle):
    """[begin, end) of each document in rows of the batch, and bytes of a row of `output` in fp32."""
    tensors = read(ROOT / f"tests/data/{bundle}.safetensors")[1]
    batch, length, hidden = tensors["hidden_states"].shape
    if "cu_seqlens" in tensors:
        cu = tensors["cu_seqlens"].values
        return list(zip(cu, cu[1:])), 4 * hidden
    mask, out = tensors["attention_mask"].values, []
    for row in range(0, batch * length, length):
        for n in sorted(set(mask[row:row + length]) - {0}):
            at = [i for i in range(row, row + length) if mask[i] == n]
            out.append((at[0], at[-1] + 1))
    return out, 4 * hidden


class Bits(unittest.TestCase):
    def test_runs_repeat(self):
        for options in ((), ("--ranks", "4", "--share", "prefix-scan"), ("--ranks", "3", "--strategy", "in-place")):
            same = results("qwen3_5_packed_ragged", *options) == results("qwen3_5_packed_ragged", *options)
            self.assertTrue(same, options)

    def test_the_number_of_threads_changes_nothing(self):
        for bundle in ("qwen3_5_plain", "qwen3_5_odd"):
            self.assertTrue(results(bundle, OMP_NUM_THREADS="1") == results(bundle, OMP_NUM_THREADS="3"), bundle)

    def test_gathering_and_relaying_summaries_give_equal_bits(self):
        gathered = results("qwen3_5_plain", "--ranks", "8", "--share", "all-gather")
        self.assertTrue(gathered == results("qwen3_5_plain", "--ranks", "8", "--share", "relay"))
        # A scan multiplies transitions first, from four pieces on.
        self.assertFalse(gathered == results("qwen3_5_plain", "--ranks", "8", "--share", "prefix-scan"))

    def test_a_document_that_lies_whole_on_a_rank_is_as_on_one_rank(self):
        whole = 0
        # The piece of the contiguous layout that holds a row: of one row of 192 tokens, or of two rows of 96.
        by_rank = {"qwen3_5_packed_full": lambda row, ranks: row * ranks // 192,
                   "qwen3_5_packed_ragged": lambda row, ranks: (row // 96, row % 96 * ranks // 96)}
        for bundle, owner in by_rank.items():
            one = results(bundle)
            rows, width = documents(bundle)
            for ranks in (2, 3, 4):
                several = results(bundle, "--ranks", str(ranks), "--strategy", "in-place")
                for begin, end in rows:
                    if begin == end or owner(begin, ranks) != owner(end - 1, ranks):
                        continue
                    whole += 1
                    for name in ROWS:
                        part = slice(begin * width, end * width)
                        self.assertTrue(one[name][part] == several[name][part], (bundle, ranks, begin, name))
        self.assertGreater(whole, 10)


if __name__ == "__main__":
    PROGRAM = sys.argv.pop(1)
    unittest.main()
