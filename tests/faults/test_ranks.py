"""Two and four gloo ranks end where one ends that sees all of a step's images: each adaptor, balance, normaliser and
self-distillation objective. Also: a rank alone with its teacher, and a rank that dies.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
        return torch.load(trained / f"{name}-{world}-{rank}.pt", weights_only=True)

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
