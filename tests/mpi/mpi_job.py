# SPDX-License-Identifier: Apache-2.0
"""gdn-run under mpirun, with the code and the time of each process.

As a program, mpi_job.py FOLDER COMMAND... runs one process of the job and notes how it ended, whatever mpirun does to it.
"""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


class Outcome:
    """codes: by rank; seconds: from the start to the end of the last; lines: those of gdn-run on standard error."""

    def __init__(self, codes, seconds, stdout, stderr, returncode):
        self.codes, self.seconds, self.stdout, self.stderr, self.returncode = codes, seconds, stdout, stderr, returncode
        self.lines = re.findall(r"^gdn-run: .*$", stderr, re.MULTILINE)

    def __str__(self):
        return f"codes {self.codes}, {self.seconds:.1f} s, mpirun {self.returncode}\n{self.stdout}{self.stderr}"


def run(mpirun, folder, commands, faults=None, timeout=120):
    """`commands` has one command per rank; faults = {rank: (library, "N WHAT")}."""
    notes = Path(folder) / "notes"
    notes.mkdir(exist_ok=True)
    for note in notes.iterdir():
        note.unlink()
    line = [mpirun]
    for rank, command in enumerate(commands):
        line += [":"] if rank else []
        line += ["-n", "1", sys.executable, __file__, str(notes), *map(str, command)]
    environment = dict(os.environ)
    for rank, (library, text) in (faults or {}).items():
        environment |= {f"GDN_FAULT_{rank}": text, "GDN_FAULT_LIBRARY": library}
    begin = time.time()
    job = subprocess.Popen(line, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env=environment)
    try:
        stdout, stderr = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        job.terminate()
        stdout, stderr = job.communicate()
        raise AssertionError(f"the job hangs\n{stdout}{stderr}")
    codes, end, patience = {}, time.time(), time.time() + 10
    while len(codes) < len(commands) and time.time() < patience:
        for note in notes.iterdir():
            if note.name.isdigit():
                code, when = note.read_text().split()
                codes[int(note.name)] = int(code)
                end = max(end, float(when))
        time.sleep(0.01)
    return Outcome(codes, end - begin, stdout, stderr, job.returncode)


def one_process(notes, command):
    """Two processes: what mpirun started, and one in a group of its own that mpirun does not end, which starts the command in
    the group of the first and sees how it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the command sets its own
    group = os.getpgrp()
    watcher = os.fork()
    if watcher:
        return os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1])
    os.setpgid(0, 0)
    rank = os.environ["OMPI_COMM_WORLD_RANK"]
    environment = dict(os.environ)
    if f"GDN_FAULT_{rank}" in environment:
        environment["GDN_FAULT"] = environment[f"GDN_FAULT_{rank}"]
        environment["LD_PRELOAD"] = environment["GDN_FAULT_LIBRARY"]
        environment["ASAN_OPTIONS"] = environment.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
    code = subprocess.call(command, env=environment, preexec_fn=lambda: os.setpgid(0, group))
    note = Path(notes) / f"{rank}.part"
    note.write_text(f"{code} {time.time()}")
    note.rename(Path(notes) / rank)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(one_process(sys.argv[1], sys.argv[2:]))
