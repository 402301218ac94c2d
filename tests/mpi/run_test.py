#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""gdn-run --comm mpi under mpirun gives the bits of --comm threads; one process speaks, and all end with one code.

run_test.py GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY
"""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import mpi_job  # noqa: E402
from mpi_job import ARGUMENTS  # noqa: E402


class Runs(mpi_job.TestCase):
    def mpi(self, ranks, *options):
        return mpi_job.run(self.folder.name, [[ARGUMENTS.program, "--comm", "mpi", *options]] * ranks)

    def test_same_bits_as_threads(self):
        cases = (
            (4, "qwen3_5_plain", "--layout", "zigzag"),
            (4, "qwen3_5_packed_ragged", "--share", "relay"),
            (4, "qwen3_5_packed_padded", "--strategy", "in-place", "--layout", "interleaved", "--dtype", "bf16"),
            (3, "qwen3_5_cached_decode", "--share", "prefix-scan"),
            (4, "qwen3_next_packed", "--dtype", "f64", "--repeat", "2"),
            (2, "qwen3_next_left_padding", "--dtype", "f16", "--rule", "recurrent"),
            (2, "qwen3_5_width1", "--no-grad"),
            (1, "qwen3_5_odd"),
            (4, "qwen3_5_short_prompt", "--layout", "interleaved"),
        )
        for ranks, sample, *options in cases:
            self.same_bits(ranks, sample, options)

    def test_same_bits_as_threads_for_every_layout_strategy_and_way_to_share(self):
        samples = {"contiguous": "qwen3_5_packed_ragged", "zigzag": "qwen3_5_packed_ragged", "zigzag-documents": "qwen3_5_packed_full",
                   "interleaved": "qwen3_5_packed_padded", "seq-index": "qwen3_5_seq_index_permuted"}
        combinations = itertools.product(samples.items(), ("reshard", "in-place"), ("all-gather", "prefix-scan", "relay"))
        for i, ((layout, sample), strategy, share) in enumerate(combinations):  # each pair of them in both types
            dtype = ("f32", "bf16")[i % 2]
            self.same_bits(4, sample, ["--layout", layout, "--strategy", strategy, "--share", share, "--dtype", dtype])

    def same_bits(self, ranks, sample, options):
        with self.subTest(sample=sample, ranks=ranks, options=options):
            threads = subprocess.run([ARGUMENTS.program, "--ranks", str(ranks), *options, "--out", self.path("threads"), "--json",
                                      self.path("threads.json"), self.sample(sample)], capture_output=True, text=True, timeout=120)
            outcome = self.mpi(ranks, "--ranks", str(ranks), *options, "--out", "mpi", "--json", "mpi.json", self.sample(sample))
            self.assertEqual(outcome.codes, {r: threads.returncode for r in range(ranks)}, str(outcome))
            self.assertEqual(outcome.lines, [])
            self.assertTrue(self.path("mpi").read_bytes() == self.path("threads").read_bytes())
            reports = [json.loads(self.path(name).read_text()) for name in ("mpi.json", "threads.json")]
            self.assertEqual(*(r["tensors"] for r in reports))
            self.assertEqual(*(r["bytes_received"] for r in reports))
            self.assertEqual(*(set(r["milliseconds"]) for r in reports))
            before_times = [text.split("milliseconds")[0] for text in (outcome.stdout, threads.stdout)]
            self.assertEqual(*before_times)

    def test_seq_index_of_the_number_of_processes(self):
        outcome = self.mpi(4, "--layout", "seq-index", self.sample("qwen3_5_seq_index_permuted"))
        self.assertIn(set(outcome.codes.values()), ({0}, {2}), str(outcome))

    def test_it_runs_alone_without_mpirun(self):
        result = subprocess.run([ARGUMENTS.program, "--comm", "mpi", self.sample("qwen3_5_plain")], capture_output=True, timeout=60)
        self.assertEqual((result.returncode, result.stderr), (0, b""))

    def test_a_tensor_out_of_its_limit_is_exit_1_everywhere(self):
        outcome = self.mpi(3, "--tolerance", "1e-30", "--out", "out", self.sample("qwen3_5_plain"))
        self.assertEqual(outcome.codes, dict.fromkeys(range(3), 1), str(outcome))
        self.assertEqual(outcome.lines, [])
        self.assertEqual(outcome.stdout.count("expected.output"), 1)
        self.assertTrue(self.path("out").exists())

    def refuses(self, commands, *words):
        self.path("out").write_text("before")
        files = set(os.listdir(self.folder.name))
        outcome = mpi_job.run(self.folder.name, commands)
        with self.subTest(words=words):
            self.assertEqual(outcome.codes, dict.fromkeys(range(len(commands)), 2), str(outcome))
            self.assertEqual(len(outcome.lines), 1, str(outcome))
            for word in words:
                self.assertIn(word, outcome.lines[0])
            self.assertEqual(outcome.stdout, "")
            self.assertEqual(self.path("out").read_text(), "before")
            self.assertEqual(set(os.listdir(self.folder.name)), files)

    def test_bad_usage_and_bad_input_are_exit_2_everywhere_and_one_line(self):
        plain, self.broken = self.sample("qwen3_5_plain"), str(self.path("broken"))
        Path(self.broken).write_bytes(Path(plain).read_bytes()[:-1])
        program = [ARGUMENTS.program, "--comm", "mpi", "--out", "out"]
        self.refuses([[*program, "--layout", "spiral", plain]] * 4, "--layout", "spiral")
        self.refuses([[*program, "--layout"]] * 2, "--layout")
        self.refuses([[ARGUMENTS.program, "--comm=mpi", "--ranks", "0", plain]] * 2, "--ranks", "0")
        self.refuses([[*program, "--ranks", "3", plain]] * 4, "--ranks", "3", "processes, 4")
        self.refuses([[*program, "--backend", "cuda", plain]] * 2, "--backend")
        self.refuses([[*program, "--deadline", "-1", plain]] * 2, "--deadline", "-1")
        self.refuses([[*program, self.broken]] * 3, "broken")
        self.refuses([[*program, "absent"]] * 3, "absent")
        self.refuses([[*program, "--layout", "seq-index", plain]] * 2, "seq_index")
        self.refuses([[*program, "--json", "out", plain]] * 2, "--out")
        self.refuses([[ARGUMENTS.program, "--bogus"]] * 3, "--bogus")

    def test_processes_that_differ_are_exit_2_everywhere_and_one_line(self):
        plain, other = self.sample("qwen3_5_plain"), self.sample("qwen3_5_odd")
        program = [ARGUMENTS.program, "--comm", "mpi", "--out", "out"]
        self.refuses([[*program, plain]] * 2 + [[*program, "absent"]], "rank 2", "absent")
        self.refuses([[*program, plain]] * 2 + [[*program, other]], "rank 2", "another bundle")
        self.refuses([[*program, plain]] + [[*program, "--share", "relay", plain]], "rank 1", "other options")
        self.refuses([[*program, "--layout", "spiral", plain]] + [[*program, plain]], "spiral")
        self.refuses([[*program, plain]] + [[*program, "--bogus", plain]], "rank 1", "--bogus")


if __name__ == "__main__":
    mpi_job.main()
