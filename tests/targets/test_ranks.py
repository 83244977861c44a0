"""Two gloo ranks with half a batch each hold the statistics of one rank with the whole batch.

Covers every normaliser, the dispersion of AngleBalanced and the averages of AdaLoss; and that ranks draw differently.
This file runs itself as the two processes.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist

from agglom.balance import AdaLoss, TeacherDropping
from agglom.objectives import AngleBalanced
from agglom.targets import PHIS, Standardize, Whiten

C, STEPS, ROWS = 12, 6, 64


def scenario(rank: int, world: int) -> dict[str, torch.Tensor]:
    """A few steps on this rank's part; unequal parts and masks, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(0)
    normalizers = {
        "ema": Standardize(C),
        "unic": Standardize(C, total_steps=STEPS, initial="raw"),
        "frozen": Standardize(C, schedule="frozen", warmup_steps=4),
        "running": Standardize(C, schedule="running"),
        "phis": PHIS(C, update_every=2),
        "phis13": PHIS(C + 1, update_every=2),
        "pca": Whiten(C, update_every=2),
        "zca": Whiten(C, kind="zca", update_every=2),
    }
    angle, ada, dropping = AngleBalanced(), AdaLoss(), TeacherDropping()
    out = {}
    for step in range(STEPS):
        x = torch.randn(ROWS, C + 1, generator=generator) * torch.arange(1, C + 2) + 5 + step
        mask = torch.rand(ROWS, generator=generator) > 0.3
        losses, valid = torch.rand(3, ROWS, generator=generator), torch.rand(3, ROWS, generator=generator) > 0.5
        part = slice(0, ROWS) if world == 1 else (slice(0, 20), slice(20, ROWS))[rank]
        x, mask, losses, valid = x[part], mask[part], losses[:, part], valid[:, part]
        for name, norm in normalizers.items():
            rows = x[:, : norm.dim]
            out[f"{name}.{step}"] = norm.normalize(rows, mask)
            norm.update(rows, mask)
        angle.update(x)
        ada(losses, valid)
        out[f"dropping.{step}"] = dropping(
            torch.rand(3, 1000, generator=torch.Generator().manual_seed(step)), torch.ones(3, 1000).bool()
        )
    for name, norm in normalizers.items():
        out |= {f"{name}.{key}": value for key, value in norm.state_dict().items()}
    return out | {"dispersion": angle.dispersion, "average": ada.average, "seen": ada.seen}


def test_two_ranks_are_one(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r)], env=env, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    one = scenario(0, 1)
    two = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for name, want in one.items():
        if name.startswith("dropping"):
            assert not torch.equal(two[0][name], two[1][name]) and torch.equal(two[0][name], want)
        elif name.split(".")[-1].isdigit():  # normalised rows
            torch.testing.assert_close(torch.cat([t[name] for t in two]), want, rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert torch.equal(two[0][name], two[1][name]), name  # not a bit apart, or the ranks would drift
            assert (two[0][name] - want).double().norm() <= 1e-5 * want.double().norm(), name


if __name__ == "__main__":
    folder, me = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=2)
    torch.save(scenario(me, 2), f"{folder}/{me}.pt")
    dist.destroy_process_group()
