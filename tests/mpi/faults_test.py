#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Killed, absent, stopped and throwing processes of gdn-run --comm mpi: every job ends within 10 s, the others with code 3,
and one line says what happened.

faults_test.py GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import mpi_job  # noqa: E402
from mpi_job import ARGUMENTS  # noqa: E402

RANKS = 4
# The receives of a process: rank 0 has one per other rank and step of the program before the layer's first exchange.
IN_THE_RUN = {0: 12, 1: 6, 2: 6, 3: 6}


class Faults(mpi_job.TestCase):
    def job(self, *words, commands=None, faults=None, options=(), lost=None):
        program = [ARGUMENTS.program, "--comm", "mpi", "--layout", "zigzag", "--out", "out", *options, self.sample("qwen3_5_plain")]
        outcome = mpi_job.run(self.folder.name, commands or [program] * RANKS, faults)
        with self.subTest(words=words, options=options, faults=faults):
            self.ends_in_failure(outcome, words, within=10, lost=lost or {})

    def fault(self, rank, what, *words, at=None, **more):
        self.job(*words, faults={rank: f"{at or IN_THE_RUN[rank]} {what}"}, **more)

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
        program = [ARGUMENTS.program, "--comm", "mpi", self.sample("qwen3_5_plain")]
        self.job("not every process of the job came", commands=[program] * 3 + [["sleep", "30"]], lost={3: None})
        self.job("not every process of the job came", commands=[["sleep", "1"]] + [program] * 3, lost={0: 0})


if __name__ == "__main__":
    mpi_job.main()
