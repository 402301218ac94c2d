#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Killed, absent, stopped and throwing processes of gdn-run --comm mpi: every job ends within 10 s, the others with code 3,
and one line says what happened.

faults_test.py GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY
"""
import argparse
import sys
import tempfile
import unittest
from pathlib import Path

import mpi_job

ARGUMENTS = argparse.Namespace()
RANKS = 4
# The receives of a process: rank 0 has one per other rank and step of the program before the layer's first exchange.
IN_THE_RUN = {0: 12, 1: 6, 2: 6, 3: 6}


class Faults(unittest.TestCase):
    def job(self, *words, commands=None, faults=None, options=(), others=3, lost=None):
        """Every rank but those of `lost` ends with code `others`, which have a code of their own or none."""
        lost = lost or {}
        with tempfile.TemporaryDirectory() as folder:
            bundle = ARGUMENTS.data / "qwen3_5_plain.safetensors"
            program = [ARGUMENTS.program, "--comm", "mpi", "--layout", "zigzag", "--out", "out", *options, bundle]
            outcome = mpi_job.run(ARGUMENTS.mpirun, folder, commands or [program] * RANKS, faults)
            written = (Path(folder) / "out").exists()
        with self.subTest(words=words, options=options, faults=faults):
            for rank in range(RANKS):
                if rank not in lost:
                    self.assertEqual(outcome.codes.get(rank), others, f"rank {rank}: {outcome}")
                elif lost[rank] is not None:
                    self.assertEqual(outcome.codes.get(rank), lost[rank], f"rank {rank}: {outcome}")
            self.assertEqual(len(outcome.lines), 1, str(outcome))
            for word in words:
                self.assertIn(word, outcome.lines[0])
            self.assertLess(outcome.seconds, 10)
            self.assertNotEqual(outcome.returncode, 0)
            self.assertEqual(outcome.stdout, "")
            self.assertFalse(written)
            print(f"{outcome.seconds:5.1f} s  {outcome.lines[0]}", file=sys.stderr)

    def fault(self, rank, what, *words, at=None, **more):
        self.job(*words, faults={rank: (ARGUMENTS.faults, f"{at or IN_THE_RUN[rank]} {what}")}, **more)

    def test_a_killed_rank(self):
        for rank in (0, 2):
            self.fault(rank, "kill", f"rank {rank} (process ", "was killed or left", lost={rank: -9})
        self.fault(3, "kill", "rank 3 (process ", at=1, lost={3: -9})  # before the run

    def test_a_rank_that_leaves(self):
        for rank in (0, 2):
            self.fault(rank, "exit", f"rank {rank} (process ", "was killed or left", lost={rank: 0})

    def test_a_rank_that_throws(self):
        for rank in (0, 2):
            self.fault(rank, "throw", "out of memory" if rank == 0 else "rank 2: out of memory")
        self.fault(1, "error", "MPI_Irecv failed: MPI_ERR_OTHER")

    def test_a_rank_that_stops(self):
        self.fault(2, "stop", "rank 2", lost={2: None})
        self.fault(0, "stop", "rank 0", options=("--deadline", "2"), lost={0: None})
        self.fault(1, "sleep", "rank 1", options=("--deadline", "2"), lost={1: None})
        self.fault(2, "sleep", "rank 2", at=1, options=("--deadline", "2"), lost={2: None})  # before the run

    def test_a_rank_that_never_comes(self):
        bundle = ARGUMENTS.data / "qwen3_5_plain.safetensors"
        program = [ARGUMENTS.program, "--comm", "mpi", bundle]
        self.job("not every process of the job came", commands=[program] * 3 + [["sleep", "30"]], lost={3: None})
        self.job("not every process of the job came", commands=[["sleep", "1"]] + [program] * 3, lost={0: 0})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    for option in ("--data", "--mpirun", "--faults"):
        parser.add_argument(option, required=True)
    ARGUMENTS, rest = parser.parse_known_args()
    ARGUMENTS.data = Path(ARGUMENTS.data)
    unittest.main(argv=[sys.argv[0], *rest])
