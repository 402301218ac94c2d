# SPDX-License-Identifier: Apache-2.0
"""gdn-run under mpirun, with the code and the time of each process; and what the tests that do so share.

As a program, mpi_job.py FOLDER COMMAND... runs one process of the job and notes how it ended, whatever mpirun does to it.
"""
import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ARGUMENTS = argparse.Namespace()  # of the test program, once main() has read them


class Outcome:
    """commands, codes: by rank; seconds: from the start to the end of the last; lines: those of gdn-run on standard error."""

    def __init__(self, commands, codes, seconds, stdout, stderr, returncode):
        self.commands, self.codes, self.seconds, self.returncode = commands, codes, seconds, returncode
        self.stdout, self.stderr = stdout, stderr
        self.lines = re.findall(r"^gdn-run: .*$", stderr, re.MULTILINE)

    def __str__(self):
        return f"codes {self.codes}, {self.seconds:.1f} s, mpirun {self.returncode}\n{self.stdout}{self.stderr}"


def run(folder, commands, faults=None, timeout=120):
    """`commands` has one command per rank; faults = {rank: "N WHAT"}, for the library of --faults."""
    with tempfile.TemporaryDirectory() as notes:  # one for each job: a process of a job before may still be about to end
        return run_with_notes(Path(notes), folder, commands, faults or {}, timeout)


def run_with_notes(notes, folder, commands, faults, timeout):
    line = [ARGUMENTS.mpirun]
    for rank, command in enumerate(commands):
        line += [":"] if rank else []
        line += ["-n", "1", sys.executable, __file__, str(notes), *map(str, command)]
    environment = dict(os.environ)
    for rank, text in faults.items():
        environment |= {f"GDN_FAULT_{rank}": text, "GDN_FAULT_LIBRARY": ARGUMENTS.faults}
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
    return Outcome(commands, codes, end - begin, stdout, stderr, job.returncode)


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


class TestCase(unittest.TestCase):
    """A test with a folder of its own."""

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)

    def path(self, name):
        return Path(self.folder.name) / name

    def sample(self, name):
        return str(ARGUMENTS.data / f"{name}.safetensors")

    def ends_in_failure(self, outcome, words, within, lost, others=3):
        """Every rank but those of `lost`, which have a code of their own or None, ends with code `others`; one line has all words."""
        for rank in range(len(outcome.commands)):
            if lost.get(rank, others) is not None:
                self.assertEqual(outcome.codes.get(rank), lost.get(rank, others), f"rank {rank}: {outcome}")
        self.assertEqual(len(outcome.lines), 1, str(outcome))
        for word in words:
            self.assertIn(word, outcome.lines[0])
        self.assertLess(outcome.seconds, within)
        self.assertNotEqual(outcome.returncode, 0)
        self.assertEqual(outcome.stdout, "")
        self.assertFalse(self.path("out").exists())
        print(f"{outcome.seconds:5.1f} s  {outcome.lines[0]}", file=sys.stderr, flush=True)


def main(add_arguments=lambda parser: None):
    """TEST GDN_RUN --data DIR --mpirun MPIRUN --faults LIBRARY [of unittest]"""
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    for option in ("--data", "--mpirun", "--faults"):
        parser.add_argument(option, required=True)
    add_arguments(parser)
    _, rest = parser.parse_known_args(namespace=ARGUMENTS)
    ARGUMENTS.data = Path(ARGUMENTS.data)
    unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    sys.exit(one_process(sys.argv[1], sys.argv[2:]))
