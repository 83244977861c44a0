"""Runs `agglom fit` in forked processes that die where they are told to: `driver.py JOBS.json`.

A job: `args` of fit, `log`, and optionally `kill`: [place, number, seconds]. The process kills itself with SIGKILL
that many seconds after its step of that number has begun (place "step"), or sends itself a signal at once (its name is
the place), or is killed while it writes its checkpoint of that number: with half of the file written ("half"), all of
it ("written"), or at the renames ("named", "linked"). `fresh`: without this file, the job starts anew. `truncate`: a
file to cut in half before. `ranks` and `port`: so many processes of a group, started as torchrun does it, or with
`slurm` as srun does. Prints how each process ended.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from agglom.callbacks import checkpoint_files, checkpoints
from agglom.distiller import Distiller
from agglom.fit import fit


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def arm(place, number, seconds):
    counts = {"step": 0, "saved": 0}

    def nth(kind, function, then):
        def counted(*args, **kwargs):
            counts[kind] += 1
            if counts[kind] == number:
                then(*args)
            return function(*args, **kwargs)

        return counted

    def half(checkpoint, file):
        import io

        buffer = io.BytesIO()
        save(checkpoint, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        die()

    save = torch.save
    if place.startswith("SIG"):
        stop = lambda *_: os.kill(os.getpid(), getattr(signal, place))  # noqa: E731
        Distiller.training_step = nth("step", Distiller.training_step, stop)
    elif place == "step":
        begin = Distiller.training_step
        Distiller.training_step = nth("step", begin, lambda *_: threading.Timer(seconds, die).start())
    elif place == "half":
        checkpoints.torch.save = nth("saved", save, half)
    elif place == "written":
        checkpoints.publish = nth("saved", checkpoints.publish, die)
    elif place == "named":
        checkpoint_files._alias = nth("saved", checkpoint_files._alias, die)
    elif place == "linked":

        def linked(source, target, link=os.link):
            link(source, target)
            die()

        os.link = nth("saved", os.link, linked)


def run(job):
    with open(job["log"], "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if "kill" in job:
        arm(*job["kill"])
    try:
        fit(job["args"])
        code = 0
    except checkpoints.Stopped as err:
        print(err)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def torchrun(rank, ranks):
    one = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
    return {**one, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "TORCHELASTIC_RUN_ID": "test"}


def srun(rank, ranks):
    one = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": ranks, "SLURM_NTASKS_PER_NODE": ranks}
    return {**one, **job, "SLURM_STEP_NUM_TASKS": ranks}


def start(job, rank):
    child = os.fork()
    if child == 0:
        if "ranks" in job:
            os.environ |= (srun if job.get("slurm") else torchrun)(str(rank), str(job["ranks"]))
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job["port"])}
        run(job)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "truncate" in job:
            path = Path(job["truncate"])
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if "fresh" in job and not Path(job["fresh"]).exists():
            job["args"] = [arg for arg in job["args"] if arg not in ("--ckpt_path", "last")] + ["--overwrite", "true"]
        children = [start(job, rank) for rank in range(job.get("ranks", 1))]
        ended = {}
        while len(ended) < len(children):
            child, status = os.wait()
            ended[child] = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            if ended[child]:  # the others would wait for it
                for other in set(children) - set(ended):
                    os.kill(other, signal.SIGKILL)
        print(*(ended[child] for child in children), flush=True)
