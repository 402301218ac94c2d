#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Killed, absent, stopped and failing processes of gdn-run --comm nccl: the others end with code 3, and one line says what
happened.

faults_test.py GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY
"""
import nccl_job
from nccl_job import mpi_job
from mpi_job import ARGUMENTS

RANKS = 4
DEADLINE = 6  # seconds
LONGEST = 25  # seconds: starting, the deadline, and telling each other


class Faults(mpi_job.TestCase):
    def fault(self, rank, what, *words, at=1, lost=None):
        """Rank `rank` does `what` at its receive number `at`, or at the start of NCCL; it ends with code `lost` or somehow."""
        program = [ARGUMENTS.program, "--backend", "cuda", "--comm", "nccl", "--layout", "zigzag", "--out", "out", "--deadline",
                   str(DEADLINE), self.sample("qwen3_5_plain")]
        outcome = nccl_job.run(self.folder.name, RANKS, program, {rank: f"{at} {what}"})
        with self.subTest(rank=rank, what=what, at=at):
            self.ends_in_failure(outcome, words, within=LONGEST, lost={rank: lost})

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
    mpi_job.main()
