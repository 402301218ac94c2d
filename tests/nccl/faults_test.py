#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Killed, absent, stopped and failing processes of gdn-run --comm nccl: the others end with code 3, and one line says what
happened.

faults_test.py GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY
"""
import argparse
import sys
import tempfile
import unittest
from pathlib import Path

import nccl_job

ARGUMENTS = argparse.Namespace()
RANKS = 4
DEADLINE = 6  # seconds
LONGEST = 25  # seconds: starting, the deadline, and telling each other


class Faults(unittest.TestCase):
    def fault(self, rank, what, *words, at=1, lost=None):
        """Rank `rank` does `what` at its receive number `at`, or at the start of NCCL; it ends with code `lost` or somehow."""
        with tempfile.TemporaryDirectory() as folder:
            program = [ARGUMENTS.program, "--backend", "cuda", "--comm", "nccl", "--layout", "zigzag", "--out", "out", "--deadline",
                       str(DEADLINE), ARGUMENTS.data / "qwen3_5_plain.safetensors"]
            outcome = nccl_job.run(ARGUMENTS.mpirun, folder, RANKS, program, {rank: (ARGUMENTS.faults, f"{at} {what}")})
            written = (Path(folder) / "out").exists()
        with self.subTest(rank=rank, what=what, at=at):
            for r in range(RANKS):
                if r != rank:
                    self.assertEqual(outcome.codes.get(r), 3, f"rank {r}: {outcome}")
                elif lost is not None:
                    self.assertEqual(outcome.codes.get(r), lost, f"rank {r}: {outcome}")
            self.assertEqual(len(outcome.lines), 1, str(outcome))
            for word in words:
                self.assertIn(word, outcome.lines[0])
            self.assertLess(outcome.seconds, LONGEST)
            self.assertNotEqual(outcome.returncode, 0)
            self.assertEqual(outcome.stdout, "")
            self.assertFalse(written)
            print(f"{outcome.seconds:5.1f} s  rank {rank} {what}: {outcome.lines[0]}", file=sys.stderr, flush=True)

    def test_a_killed_rank(self):
        for rank in (0, 2):
            self.fault(rank, "kill", f"rank {rank} (process ", "was killed or left", at=2, lost=-9)

    def test_a_rank_that_leaves(self):
        self.fault(2, "exit", "rank 2 (process ", "was killed or left", lost=0)

    def test_a_rank_that_stops_or_never_comes_to_an_exchange(self):
        self.fault(2, "stop", "rank")
        self.fault(0, "sleep", "rank")

    def test_a_rank_that_never_comes_to_the_start_of_nccl(self):
        self.fault(1, "sleep", "rank", at=0)

    def test_an_error_of_nccl(self):
        self.fault(2, "error", "rank 2: ncclRecv failed", at=2, lost=3)
        self.fault(1, "error", "rank 1: ncclCommInitRankConfig failed", at=0, lost=3)


if __name__ == "__main__":
    nccl_job.skip_without_gpu()
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    for option in ("--data", "--mpirun", "--faults"):
        parser.add_argument(option, required=True)
    ARGUMENTS, rest = parser.parse_known_args()
    ARGUMENTS.data = Path(ARGUMENTS.data)
    unittest.main(argv=[sys.argv[0], *rest])
