"""RankMe against a singular value decomposition, gradient shares against plain autograd, and that a run logs them."""

import pytest
import torch
from torch.utils.data import DataLoader

from agglom.balance import TeacherDropping
from agglom.diagnostics import RankMe, gradient_shares
from agglom.distiller import Distiller
from agglom.features import StudentFeatures


def rankme(rows):
    """Equation 1 of RankMe, from the rows themselves."""
    values = torch.linalg.svdvals(rows.double())
    shares = values / values.sum() + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()


def test_rankme_is_that_of_the_singular_values_for_any_split():
    rows = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.linspace(0.1, 3, 12))
    measure = RankMe()
    for part in rows.split([60, 40, 100]):
        measure.update(part.view(2, -1, 12))
    assert measure.compute() == pytest.approx(rankme(rows), rel=1e-4)
    assert measure.compute() == 0.0, "a value speaks of what came since the last one"


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rankme_counts_equal_directions(rank):
    """Orthonormal rows in `rank` directions have that effective rank."""
    basis = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q[:rank]
    measure = RankMe()
    measure.update(basis.repeat(5, 1))
    assert measure.compute() == pytest.approx(rank, rel=1e-2)  # roots of rounding errors in a float32 Gram matrix


def test_rankme_does_not_see_scale():
    rows = torch.randn(50, 6)
    values = []
    for scale in (1e-2, 1.0, 1e3):
        measure = RankMe()
        measure.update(rows * scale)
        values.append(measure.compute())
    assert values == pytest.approx([values[0]] * 3, rel=1e-4)


def test_gradient_shares_by_hand():
    """Terms a * sum(x) and b * sum(y): norms a sqrt(n) and b sqrt(m)."""
    summary, spatial = torch.zeros(1, 1, 4, requires_grad=True), torch.zeros(1, 4, 3, 3, requires_grad=True)
    tap = torch.zeros(1, 1, 4, requires_grad=True)
    student = StudentFeatures(summary, spatial, {"b": (tap, torch.zeros(1))})
    terms = [3 * summary.sum(), spatial.sum(), torch.zeros(()), 2 * tap.sum() + 2 * summary.sum()]
    shares = gradient_shares(terms, student)
    norms = torch.tensor([3 * 2.0, 6.0, 0.0, (16 + 16) ** 0.5])
    torch.testing.assert_close(shares, norms / norms.sum())
    assert not shares.requires_grad
    terms[0].backward()  # the graph is still there
    assert summary.grad is not None


def test_a_run_logs_them(tiny_student, tiny_teachers, quiet_trainer):
    """Every teacher's loss, weight, share kept, target scale and share of the gradient; RankMe at validation."""
    module = Distiller(
        tiny_student(summary_tokens=2), tiny_teachers(), balance=TeacherDropping(p=1.0), gradient_shares_every=2,
        warmup_steps=0,
    )  # fmt: skip
    logged = []

    class Keep:
        def log_metrics(self, metrics, step=None):
            logged.append((step, dict(metrics)))

    from lightning.pytorch.loggers import Logger

    class Recorder(Keep, Logger):
        name, version = "recorder", 0

        def log_hyperparams(self, *_, **__):
            pass

    batches = [{"image": torch.rand(6, 3, 32, 32), "key": list("abcdef")} for _ in range(4)]
    trainer = quiet_trainer(
        max_steps=4, logger=Recorder(), log_every_n_steps=1, val_check_interval=4, check_val_every_n_epoch=None
    )
    trainer.fit(module, DataLoader(batches, batch_size=None), DataLoader(batches[:2], batch_size=None))
    steps = {step: metrics for step, metrics in logged if "train/loss" in metrics}
    for metrics in steps.values():
        for name in ("clip", "dino", "sam"):
            assert {f"train/{name}/{key}" for key in ("loss", "spatial_loss", "weight", "kept")} <= set(metrics)
            assert abs(metrics[f"train/{name}/spatial_target_mean"]) < 2
            assert 0.2 < metrics[f"train/{name}/spatial_target_std"] < 5
        # p = 1: each image keeps its worst teacher alone
        assert sum(metrics[f"train/{name}/kept"] for name in ("clip", "dino", "sam")) == pytest.approx(1)
        assert sum(metrics[f"train/{name}/weight"] for name in ("clip", "dino", "sam")) == pytest.approx(1)
    first = steps[0]
    assert first["train/clip/spatial_target_std"] == pytest.approx(1, abs=0.05)  # normalised by its own batch
    assert [any("gradient_share" in key for key in steps[step]) for step in range(4)] == [False, True, True, True]
    shares = [steps[1][f"train/{name}/gradient_share"] for name in ("clip", "dino", "sam")]
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    kept = [steps[1][f"train/{name}/kept"] for name in ("clip", "dino", "sam")]
    assert all((share > 0) == (k > 0) for share, k in zip(shares, kept, strict=True))
    (validation,) = [metrics for _, metrics in logged if "val/loss" in metrics]
    assert 1 <= validation["val/summary_rankme"] <= 12 and 1 <= validation["val/spatial_rankme"] <= 32
