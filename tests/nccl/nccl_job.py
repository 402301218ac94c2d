# SPDX-License-Identifier: Apache-2.0
"""gdn-run --comm nccl under mpirun, a GPU per process or one GPU for all."""
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import mpi_job  # noqa: E402


def gpus():
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        return 0
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def skip_without_gpu():
    """In the words by which CTest counts a skipped test."""
    if gpus() == 0:
        print("[  SKIPPED ] no CUDA device")
        sys.exit(0)


def of_rank(rank, ranks, command):
    """NCCL takes processes that share a GPU for ranks of one machine and refuses, unless each names a machine of its own."""
    if gpus() >= ranks:
        return command
    return ["env", f"NCCL_HOSTID=process{rank}", "NCCL_SOCKET_IFNAME=lo", "NCCL_P2P_DISABLE=1", "NCCL_SHM_DISABLE=1",
            "NCCL_IB_DISABLE=1", *command]


def run(folder, ranks, command, faults=None):
    return mpi_job.run(folder, [of_rank(r, ranks, command) for r in range(ranks)], faults)
