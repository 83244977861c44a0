"""Two and four gloo ranks end where one ends that sees all of a step's images: each adaptor, balance, normaliser and
self-distillation objective; once the first ranks train with one teacher alone. And a rank that dies ends the job.
"""

import importlib.util
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from agglom.callbacks import checkpoint_path, read_checkpoint

SCRIPT = Path(__file__).with_name("ranks.py")


def _cases():
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RANKS = _cases()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread):
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(out)], env=one_thread, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RANKS.CASES))
def test_ranks_end_where_one_ends(name, trained):
    def state(world, rank):
        saved = torch.load(trained / f"{name}-{world}-{rank}.pt", weights_only=True)
        kept[world].append(saved.pop("kept"))
        return saved

    kept = {world: [] for world in RANKS.WORLDS}

    one = state(1, 0)
    torch.manual_seed(0)
    for world in RANKS.WORLDS[1:]:
        first = state(world, 0)
        for part, tensors in one.items():
            assert tensors.keys() == first[part].keys()
            for key, expected in tensors.items():
                where = f"{world} ranks: {part}: {key}"
                found = first[part][key]
                # a map divides by roots of eigenvalues, which random teachers have small ones of
                least = 1e-3 * expected.abs().max().item() if key.endswith("_map") else 3e-5
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=least, msg=lambda m, w=where: f"{w}: {m}")
        for rank in range(1, world):
            for part, tensors in state(world, rank).items():
                for key, x in tensors.items():
                    assert torch.equal(x, first[part][key]), f"rank {rank} of {world}: {part}: {key}"
    if name == "TeacherDropping here":
        for world in RANKS.WORLDS[1:]:
            shares = torch.stack(kept[world])  # (ranks, teachers)
            assert (shares[0] == 0).sum() == 1 and (shares[-1] == 1).all(), shares


@pytest.mark.slow
def test_the_cases_are_all_there_are():
    """A new adaptor, balance, normaliser or objective has to be trained here too."""
    import agglom.adaptors
    import agglom.balance
    import agglom.selfdistill
    import agglom.targets

    wanted = {n for n in agglom.adaptors.__all__ if n.endswith("Adaptor") and n != "Adaptor"}
    wanted |= {c.__name__ for c in agglom.balance.Balance.__subclasses__()} - {"Drawing"}
    wanted |= {"TeacherDropping", "RandomK"}
    wanted |= set(agglom.targets.__all__) - {"Memory", "Normalizer"}
    wanted |= set(agglom.selfdistill.__all__) - {"Objective", "Scene"}
    assert {name.split()[0] for name in RANKS.CASES} >= wanted


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_within_a_minute(tmp_path, scenes, one_thread, dies):
    """With one line that says so; the checkpoint before is whole. Rank 0 keeps the address where all meet."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        from test_killed import config
    finally:
        sys.path.remove(str(SCRIPT.parent))
    written = config(scenes, tmp_path / "run", 1)
    written["trainer"] |= {"max_steps": 5000, "val_check_interval": 5000, "devices": 2}
    written["trainer"]["strategy"] = "ddp_find_unused_parameters_true"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(written))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "agglom.cli", "fit", "--config", str(tmp_path / "c.yaml")]
    ranks = []
    for rank in ("0", "1"):
        with open(tmp_path / f"{rank}.log", "w") as log:
            env = {**one_thread, **job, "RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        until = time.monotonic() + 120
        while not checkpoint_path(tmp_path / "run").exists():
            assert time.monotonic() < until and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        ranks[dies].kill()
        assert ranks[1 - dies].wait(60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    said = (tmp_path / f"{1 - dies}.log").read_text()
    words = f"agglom fit: rank {1 - dies} lost another rank after step "
    (line,) = [line for line in said.splitlines() if line.startswith(words)]
    assert "--ckpt_path last goes on" in line and "Traceback" not in said
    read_checkpoint(checkpoint_path(tmp_path / "run"))
