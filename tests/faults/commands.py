"""Runs an `agglom` command, kills it at 20 random moments, lets it end: `commands.py JOB.json`.

A job: `args` with the word OUT where the output folder stands, `out` (a folder), `seed`, `log`. The command runs once
without being killed into OUT/whole. Then it runs into OUT/killed, each time killed with SIGKILL at a moment drawn from
the fastest run's duration so far, until it has been killed 20 times; one that ended before its moment begins anew.
Prints the number of kills and how often it had already ended. Processes are forked: what they import is there already.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import agglom.cache.command
import agglom.commands
import agglom.probes  # noqa: F401
from agglom.cli import main

KILLS = 20


def start(args, log):
    if child := os.fork():
        return child
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgid(0, 0)  # with the workers that it starts
    code = 1
    try:
        main(args)
        code = 0
    except SystemExit as err:
        code = err.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child, seconds):
    """Whether it has ended by itself after so long; its exit code must be 0."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, os.waitstatus_to_exitcode(status)
            return True
        time.sleep(0.005)
    return False


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = json.loads(Path(sys.argv[1]).read_text())
    out, log = Path(job["out"]), job["log"]

    def args(name):
        return [arg.replace("OUT", str(out / name)) for arg in job["args"]]

    began = time.monotonic()
    assert ended(start(args("whole"), log), 600)
    lasts = time.monotonic() - began
    rng, kills, done = random.Random(job["seed"]), 0, 0
    while kills < KILLS:
        moment, began = rng.uniform(0, lasts), time.monotonic()
        child = start(args("killed"), log)
        if ended(child, moment):
            lasts = min(lasts, time.monotonic() - began)  # the first run may have met a busy machine
            done += 1
            shutil.rmtree(out / "killed")
            continue
        os.killpg(child, signal.SIGKILL) if os.getpgid(child) == child else os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    assert ended(start(args("killed"), log), 600)
    print(kills, done)
