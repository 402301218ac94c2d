#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gdn-run --comm nccl under mpirun gives the bits of --comm local, which give those of one rank within the bundle's limits.

run_test.py GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY [--ranks 2,4,8] [--cases N]
"""
import json
import subprocess
import sys

import nccl_job
from nccl_job import mpi_job
from mpi_job import ARGUMENTS

# Every layout, both strategies, the three ways to share; packing, padding, states that come in and go out, decoding, ranks
# without tokens; gradients in all but one. A seq_index is for 2 ranks or for 4 and refused with others.
CASES = (
    ("qwen3_5_plain", "--layout", "zigzag"),
    ("qwen3_5_plain", "--layout", "zigzag", "--strategy", "in-place", "--dtype", "bf16"),
    ("qwen3_5_packed_ragged", "--share", "relay", "--dtype", "f16"),
    ("qwen3_5_right_padding", "--strategy", "in-place", "--layout", "interleaved", "--dtype", "bf16"),
    ("qwen3_5_packed_full", "--layout", "zigzag", "--strategy", "in-place", "--share", "prefix-scan"),
    ("qwen3_5_packed_full", "--layout", "zigzag-documents", "--strategy", "in-place", "--dtype", "bf16"),
    ("qwen3_5_seq_index_even_odd", "--layout", "seq-index", "--strategy", "in-place"),
    ("qwen3_5_seq_index_permuted", "--layout", "seq-index", "--dtype", "f16"),
    ("qwen3_5_cached_decode", "--share", "prefix-scan"),
    ("qwen3_next_packed", "--layout", "interleaved", "--repeat", "2"),
    ("qwen3_next_ratio2", "--share", "relay"),
    ("qwen3_5_short_prompt", "--layout", "interleaved"),
    ("qwen3_5_right_padding", "--layout", "zigzag"),
    ("exact_split", "--no-grad"),
    ("qwen3_5_ratio4",),
)


class Runs(mpi_job.TestCase):
    def nccl(self, ranks, *options):
        return nccl_job.run(self.folder.name, ranks, [ARGUMENTS.program, "--backend", "cuda", "--comm", "nccl", *options])

    def alone(self, comm, ranks, sample, *options):
        """All ranks in one process."""
        return subprocess.run(
            [ARGUMENTS.program, "--backend", "cuda", "--comm", comm, "--ranks", str(ranks), *options, "--out", self.path(comm),
             "--json", self.path(f"{comm}.json"), self.sample(sample)], capture_output=True, text=True, timeout=120)

    def same_bits(self, ranks, sample, *options):
        local = self.alone("local", ranks, sample, *options)
        outcome = self.nccl(ranks, *options, "--out", "nccl", "--json", "nccl.json", self.sample(sample))
        self.assertEqual(outcome.codes, dict.fromkeys(range(ranks), local.returncode), f"{local.stderr}\n{outcome}")
        if local.returncode == 2:  # zigzag wants 2 P to divide the row: refused by both, and in one line
            self.assertEqual(len(outcome.lines), 1, str(outcome))
            return "refused"
        self.assertEqual(local.returncode, 0, local.stdout + local.stderr)
        self.assertEqual(outcome.lines, [], str(outcome))
        self.equal_results(local, outcome)
        return f"{outcome.seconds:.1f} s"

    def equal_results(self, local, outcome):
        self.assertTrue(self.path("nccl").read_bytes() == self.path("local").read_bytes(), str(outcome))
        reports = [json.loads(self.path(name).read_text()) for name in ("nccl.json", "local.json")]
        self.assertEqual(*(r["tensors"] for r in reports))
        self.assertEqual(*(r["bytes_received"] for r in reports))
        self.assertEqual(*(text.split("milliseconds")[0] for text in (outcome.stdout, local.stdout)))

    def test_same_bits_as_local(self):
        ran = 0
        for ranks in ARGUMENTS.ranks:
            for sample, *options in CASES[: ARGUMENTS.cases]:
                with self.subTest(sample=sample, ranks=ranks, options=options):
                    how = self.same_bits(ranks, sample, *options)
                    ran += how != "refused"
                    print(f"{ranks} ranks, {sample} {' '.join(options)}: {how}", file=sys.stderr, flush=True)
        self.assertGreater(ran, len(CASES[: ARGUMENTS.cases]) * len(ARGUMENTS.ranks) * 2 // 3)

    def test_threads_of_one_process_give_the_same_bits(self):
        if nccl_job.gpus() < 2:
            print("threads of one process: skipped, there are not two GPUs", file=sys.stderr, flush=True)
            self.skipTest("needs two GPUs")
        for sample, *options in CASES[: ARGUMENTS.cases]:
            with self.subTest(sample=sample, options=options):
                local, threads = (self.alone(comm, 2, sample, *options) for comm in ("local", "nccl"))
                self.assertEqual(threads.returncode, local.returncode, local.stderr + threads.stderr)
                if local.returncode == 2:
                    self.assertEqual(threads.stderr, local.stderr)
                    continue
                self.assertEqual((local.returncode, threads.stderr), (0, ""), local.stderr)
                self.equal_results(local, threads)

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
            self.refuses([*options, self.sample("qwen3_5_plain")], options[0])

    def test_heads_that_are_no_multiples_of_16_are_exit_2_everywhere_and_one_line(self):
        self.refuses([self.sample("qwen3_5_odd")], "linear_key_head_dim is 7")

    def refuses(self, options, word):
        outcome = self.nccl(2, *options)
        self.assertEqual(outcome.codes, {0: 2, 1: 2}, str(outcome))
        self.assertEqual(len(outcome.lines), 1, str(outcome))
        self.assertIn(word, outcome.lines[0])


def add_arguments(parser):
    parser.add_argument("--ranks", default=[2, 4], type=lambda text: [int(r) for r in text.split(",")])
    parser.add_argument("--cases", default=len(CASES), type=int)


if __name__ == "__main__":
    nccl_job.skip_without_gpu()
    mpi_job.main(add_arguments)
