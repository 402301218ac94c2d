#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gdn-run --comm nccl under mpirun gives the bits of --comm local, which give those of one rank within the bundle's limits.

run_test.py GDN_RUN --data DIR --mpirun MPIRUN [--faults LIBRARY] [--ranks 2,4,8] [--cases N]
"""
import argparse
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import nccl_job

ARGUMENTS = argparse.Namespace()

# Every layout, both strategies, the three ways to share; packing, padding, states that come in and go out, decoding, ranks
# without tokens; gradients in all but one.
CASES = (
    ("qwen3_5_plain", "--layout", "zigzag"),
    ("qwen3_5_plain", "--layout", "zigzag", "--strategy", "in-place", "--dtype", "bf16"),
    ("qwen3_5_packed_ragged", "--share", "relay", "--dtype", "f16"),
    ("qwen3_5_packed_padded", "--strategy", "in-place", "--layout", "interleaved", "--dtype", "bf16"),
    ("qwen3_5_packed_full", "--layout", "zigzag", "--strategy", "in-place", "--share", "prefix-scan"),
    ("qwen3_5_cached_decode", "--share", "prefix-scan"),
    ("qwen3_next_packed", "--layout", "interleaved", "--repeat", "2"),
    ("qwen3_next_left_padding", "--dtype", "bf16", "--share", "relay"),
    ("qwen3_5_short_prompt", "--layout", "interleaved"),
    ("qwen3_5_right_padding", "--layout", "zigzag"),
    ("qwen3_5_width1", "--no-grad"),
    ("qwen3_5_odd",),
)


class Runs(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return Path(self.folder.name) / name

    def nccl(self, ranks, *options, faults=None):
        return nccl_job.run(ARGUMENTS.mpirun, self.folder.name, ranks,
                            [ARGUMENTS.program, "--backend", "cuda", "--comm", "nccl", *options], faults)

    def sample(self, name):
        return str(ARGUMENTS.data / f"{name}.safetensors")

    def same_bits(self, ranks, sample, *options):
        local = subprocess.run(
            [ARGUMENTS.program, "--backend", "cuda", "--comm", "local", "--ranks", str(ranks), *options, "--out", self.path("local"),
             "--json", self.path("local.json"), self.sample(sample)], capture_output=True, text=True, timeout=120)
        outcome = self.nccl(ranks, *options, "--out", "nccl", "--json", "nccl.json", self.sample(sample))
        self.assertEqual(outcome.codes, dict.fromkeys(range(ranks), local.returncode), f"{local.stderr}\n{outcome}")
        if local.returncode == 2:  # zigzag wants 2 P to divide the row: refused by both, and in one line
            self.assertEqual(len(outcome.lines), 1, str(outcome))
            return "refused"
        self.assertEqual(local.returncode, 0, local.stdout + local.stderr)
        self.assertEqual(outcome.lines, [], str(outcome))
        self.assertTrue(self.path("nccl").read_bytes() == self.path("local").read_bytes(), str(outcome))
        reports = [json.loads(self.path(name).read_text()) for name in ("nccl.json", "local.json")]
        self.assertEqual(*(r["tensors"] for r in reports))
        self.assertEqual(*(r["bytes_received"] for r in reports))
        self.assertEqual(*(text.split("milliseconds")[0] for text in (outcome.stdout, local.stdout)))
        return f"{outcome.seconds:.1f} s"

    def test_same_bits_as_local(self):
        ran = 0
        for ranks in ARGUMENTS.ranks:
            for sample, *options in CASES[: ARGUMENTS.cases]:
                with self.subTest(sample=sample, ranks=ranks, options=options):
                    how = self.same_bits(ranks, sample, *options)
                    ran += how != "refused"
                    print(f"{ranks} ranks, {sample} {' '.join(options)}: {how}", file=sys.stderr, flush=True)
        self.assertGreater(ran, len(CASES[: ARGUMENTS.cases]) * len(ARGUMENTS.ranks) * 2 // 3)

    def test_one_process_alone(self):
        result = subprocess.run([ARGUMENTS.program, "--backend", "cuda", "--comm", "nccl", self.sample("qwen3_5_plain")],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual((result.returncode, result.stderr), (0, ""), result.stdout)

    def test_too_few_gpus_are_refused_by_name(self):
        ranks = str(nccl_job.gpus() + 1)
        result = subprocess.run([ARGUMENTS.program, "--backend", "cuda", "--comm", "nccl", "--ranks", ranks, self.sample("qwen3_5_plain")],
                                capture_output=True, text=True, timeout=60)
        self.assertEqual((result.returncode, result.stdout), (2, ""))
        self.assertIn(f"--ranks is {ranks}; --comm nccl needs a GPU for each rank", result.stderr)
        self.assertEqual(result.stderr.count("\n"), 1)

    def test_bad_usage_is_exit_2_everywhere_and_one_line(self):
        for options in (["--layout", "spiral"], ["--ranks", "3"], ["--dtype", "f64"]):
            outcome = self.nccl(2, *options, self.sample("qwen3_5_plain"))
            self.assertEqual(outcome.codes, {0: 2, 1: 2}, str(outcome))
            self.assertEqual(len(outcome.lines), 1, str(outcome))
            self.assertIn(options[0], outcome.lines[0])


if __name__ == "__main__":
    nccl_job.skip_without_gpu()
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    for option in ("--data", "--mpirun"):
        parser.add_argument(option, required=True)
    parser.add_argument("--faults")
    parser.add_argument("--ranks", default=[2, 4], type=lambda text: [int(r) for r in text.split(",")])
    parser.add_argument("--cases", default=len(CASES), type=int)
    ARGUMENTS, rest = parser.parse_known_args()
    ARGUMENTS.data = Path(ARGUMENTS.data)
    unittest.main(argv=[sys.argv[0], *rest])
