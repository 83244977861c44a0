"""EMA self-distillation over prototypes: the head, the teacher's assignments, the losses, the collapse monitors.

A head maps features to K logits, one a prototype. The teacher's logits become probabilities by `sinkhorn` or `Center`;
the student's are compared with them across views (`cross_view`) and at masked patches (`masked`). Everything is float32
(float64 if the input is), whatever the caller's autocast says.

Sources: DINO (2104.14294), iBOT (2111.07832), DINOv2 (2304.07193), SwAV for Sinkhorn (2006.09882).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from agglom.errors import UserError
from agglom.objectives.base import ready, widen
from agglom.objectives.pointwise import EPS
from agglom.targets.moments import Statistics, accumulator, no_autocast, sum_over_ranks

TINY = torch.finfo(torch.float32).tiny


class PrototypeHead(nn.Module):
    """Features to logits, each the cosine between the bottleneck and a prototype: an MLP of three layers, then K rows.

    The rows are normalised in the forward pass from a plain parameter, so that a copy, an EMA or a checkpoint of the
    head needs no care; their gain is fixed at 1.

    Args:
        width: D of the features.
        prototypes: K.
        hidden: width of the MLP's two hidden layers.
        bottleneck: width in which features and prototypes meet.

    Raises:
        UserError: a size below 1.
    """

    def __init__(self, width: int, *, prototypes: int = 65536, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        sizes = {"width": width, "prototypes": prototypes, "hidden": hidden, "bottleneck": bottleneck}
        if wrong := [f"{name} {size}" for name, size in sizes.items() if size < 1]:
            raise UserError(f"PrototypeHead: {', '.join(wrong)}; at least 1 wanted")
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.directions = nn.Parameter(torch.empty(prototypes, bottleneck))  # of any length; `weight` is used
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.directions, std=0.02)

    @property
    def weight(self) -> Tensor:
        """The last layer: (K, bottleneck) fp32 rows of norm 1."""
        return F.normalize(widen(self.directions), dim=-1, eps=EPS)

    def forward(self, x: Tensor, *, frozen: bool = False) -> Tensor:
        """(..., D) -> (..., K) fp32 logits in [-1, 1]; no gradient to the prototypes while `frozen`."""
        x = self.mlp(x)
        # a teacher divides its logits by 0.04: bf16's 2^-8 would be 0.1 in the exponent
        with no_autocast(x.device):
            rows = self.weight.detach() if frozen else self.weight
            return F.linear(F.normalize(widen(x), dim=-1, eps=EPS), rows)


@torch.no_grad()
def sinkhorn(
    logits: Tensor, *, temperature: float, iterations: int = 3, mask: Tensor | None = None, group: Any = None
) -> Tensor:
    """The teacher's assignments: exp(logits / temperature), scaled until samples and prototypes have equal mass.

    Each iteration gives every prototype the same mass over the samples of all ranks, then every sample the mass 1; in
    the limit prototypes have M / K each. All ranks of `group` call it together, each with any number of rows.

    Logits of any size are safe: the first iteration works on logarithms, relative to each prototype's maximum over all
    ranks. After it every sample sums to 1 and every prototype has at least 1 / K, and no later step can underflow.

    Args:
        logits: (M, K).
        temperature: of the teacher, 0.04 to 0.07 in DINOv2.
        iterations: pairs of normalisations.
        mask: (M,) bool, the rows that count; the others are neither read nor given an assignment.
        group: a process group; None is all ranks.

    Returns:
        (M, K) fp32 without gradient: valid rows sum to 1, the others are 0.

    Raises:
        ValueError: logits aren't (M, K), the mask doesn't fit, temperature <= 0, iterations < 1.
    """
    _check_temperature(temperature)
    if logits.ndim != 2 or iterations < 1:
        raise ValueError(f"(M, K) logits and iterations >= 1 wanted, got {tuple(logits.shape)} and {iterations}")
    q, wide = widen(logits), accumulator(logits.device)
    outside = None if mask is None else ~_rows(q, mask)[:, None]
    if outside is not None:
        q = q.masked_fill(outside, -torch.inf)  # exp is 0
    top = q.amax(0) if len(q) else q.new_full(q.shape[1:], -torch.inf)
    top = _max_over_ranks(top, group).clamp(min=torch.finfo(q.dtype).min)  # -inf - -inf if no row counts
    q = (q - top).div_(temperature)  # in place from here on: this is our own, and gigabytes at full size
    # masses are left as they come, not divided by K or the number of samples: the samples' step cancels constants
    (mass,) = sum_over_ranks(q.exp().sum(0, dtype=wide), group=group)
    q = q.sub_(mass.clamp(min=TINY).log().to(q.dtype)).softmax(1)
    if outside is not None:
        q.masked_fill_(outside, 0)
    for _ in range(iterations - 1):
        (mass,) = sum_over_ranks(q.sum(0, dtype=wide), group=group)
        q /= mass.clamp(min=TINY).to(q.dtype)
        q /= q.sum(1, keepdim=True).clamp(min=TINY)
    return q


class Center(Statistics):
    """The other way to the teacher's assignments: softmax((logits - c) / temperature), c a running mean of the logits.

    c <- momentum c + (1 - momentum) mean over all ranks of `group`, from 0: logits that are always c* leave
    c* - c = momentum^n c* after n updates. `assign` a step's logits, then `update` with them.

    Args:
        prototypes: K.
        momentum: share of the old centre that an update keeps.

    Raises:
        UserError: a momentum outside [0, 1].
    """

    group: Any = None
    center: Tensor

    def __init__(self, prototypes: int, *, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise UserError(f"Center: momentum {momentum}; valid: 0 to 1")
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes, dtype=torch.float64))

    @torch.no_grad()
    def assign(self, logits: Tensor, temperature: float) -> Tensor:
        """(..., K) logits -> (..., K) fp32 probabilities without gradient, by the centre as it is."""
        _check_temperature(temperature)
        logits = widen(logits)
        return ((logits - self.center.to(logits.dtype)) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Take a step's logits in. All ranks call it together.

        Args:
            logits: (..., K).
            mask: (...) bool, the rows that count; a step without any counts but moves nothing.
        """
        count, total = _pool(logits, mask, self.group)
        moves = (count > 0).to(total.dtype)
        self.center.lerp_(total / count.clamp(min=1), (1 - self.momentum) * moves)
        self._count_step()

    def reset(self) -> None:
        self.center.zero_()
        self._reset_steps()


def cross_entropy(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """-sum_k p_k log softmax(z / temperature)_k; least, the entropy of p, where the softmax is p.

    There is no factor temperature^2: the student's temperature is part of the model, not of a comparison.

    Args:
        logits: (..., K), the student's z.
        targets: (..., K) probabilities p; they get no gradient.
        temperature: of the student, 0.1 in DINO.

    Returns:
        (...) fp32, nats.

    Raises:
        ValueError: shapes differ, or temperature <= 0.
    """
    _check_temperature(temperature)
    z, p = ready(logits, targets)
    return -(p * F.log_softmax(z / temperature, -1)).sum(-1)


def cross_view(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """DINO: the mean `cross_entropy` over all pairs of a teacher's and a student's view, save those of the same view.

    Where the student sees none of the teacher's views no pair is left out, and the loss is the mean over views of
    `cross_entropy` with the teacher's mean over views.

    Args:
        student: (V, B, K) logits. The first G views are the teacher's G global views in its order, the others are
            local.
        teacher: (G, B, K) probabilities; they get no gradient.
        temperature: of the student.

    Returns:
        (B,) fp32, nats: a mean over G (V - 1) pairs.

    Raises:
        ValueError: the shapes don't fit, V < G, no pair is left (V = G = 1), temperature <= 0.
    """
    _check_temperature(temperature)
    if student.ndim != 3 or teacher.ndim != 3 or student.shape[1:] != teacher.shape[1:]:
        raise ValueError(f"(V, B, K) and (G, B, K) wanted, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    views, shared = len(student), len(teacher)
    if views < max(shared, 2) or shared < 1:
        raise ValueError(
            f"{views} student and {shared} teacher views: the student needs all the teacher's, two at least"
        )
    log_q = F.log_softmax(widen(student) / temperature, -1)
    p = widen(teacher.detach())
    # linear in p: views meet the sum of the teacher's, never a (V, G, B, K) tensor
    total = p.sum(0)
    across = ((total - p) * log_q[:shared]).sum((0, 2))
    local = (total * log_q[shared:].sum(0)).sum(-1)
    return -(across + local) / (shared * (views - 1))


def masked(student: Tensor, teacher: Tensor, *, image: Tensor, valid: Tensor, batch: int, temperature: float) -> Tensor:
    """iBOT: the mean `cross_entropy` over an image's masked patches.

    The patches of all images come as one list of a fixed length M, filled up with invalid entries, so that shapes
    don't depend on how many patches were masked.

    Args:
        student: (M, K) logits at masked patches.
        teacher: (M, K) probabilities at the same patches, which the teacher saw; they get no gradient.
        image: (M,) int64, the image in the batch that a patch is of.
        valid: (M,) bool; the other entries are not read (they may be NaN, and their image any number).
        batch: B.
        temperature: of the student.

    Returns:
        (B,) fp32, nats; 0 for an image without a valid patch.

    Raises:
        ValueError: the shapes or dtypes don't fit, or temperature <= 0.
    """
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"twice (M, K) wanted, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if image.dtype != torch.int64 or image.shape != student.shape[:1]:
        raise ValueError(f"image {image.dtype} {tuple(image.shape)} does not fit {tuple(student.shape)}: int64 wanted")
    outside = ~_rows(student, valid)
    # cleared before the loss rather than after it, so that a NaN in the filling stays out of the gradient too
    student, teacher = (x.masked_fill(outside[:, None], 0) for x in (student, teacher))
    image = image.masked_fill(outside, 0)
    values = cross_entropy(student, teacher, temperature=temperature).masked_fill(outside, 0)
    count = values.new_zeros(batch).index_add(0, image, valid.to(values.dtype))
    return values.new_zeros(batch).index_add(0, image, values) / count.clamp(min=1)


@torch.no_grad()
def mean_entropy(probabilities: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over this process' samples of each one's entropy: towards log K the teacher says nothing.

    Args:
        probabilities: (..., K).
        mask: (...) bool, the rows that count.

    Returns:
        () fp32, nats; 0 without any row.
    """
    entropy = torch.special.entr(widen(probabilities)).sum(-1).flatten()
    if mask is None:
        return entropy.sum().float() / max(len(entropy), 1)
    valid = _rows(probabilities, mask)
    return entropy.masked_fill(~valid, 0).sum().float() / valid.sum().clamp(min=1)


@torch.no_grad()
def entropy_of_mean(probabilities: Tensor, mask: Tensor | None = None, group: Any = None) -> Tensor:
    """Entropy of the mean distribution of all ranks: towards 0 all samples fall to one prototype.

    All ranks of `group` call it together.

    Args:
        probabilities: (..., K).
        mask: (...) bool, the rows that count.
        group: a process group; None is all ranks.

    Returns:
        () fp32, nats; 0 without any row.
    """
    count, total = _pool(probabilities, mask, group)
    return torch.special.entr(total / count.clamp(min=1)).sum().float()


def _pool(x: Tensor, mask: Tensor | None, group: Any) -> tuple[Tensor, Tensor]:
    """Number () and sum (K,) of all ranks' valid rows of (..., K), in the accumulator's dtype."""
    wide = accumulator(x.device)
    rows = widen(x).reshape(-1, x.shape[-1])
    count = torch.full((), len(rows), dtype=wide, device=x.device)
    if mask is not None:
        valid = _rows(x, mask)
        # filled with 0 rather than selected: selecting rows would make the host wait for their number
        rows, count = rows.masked_fill(~valid[:, None], 0), valid.sum().to(wide)
    number, total = sum_over_ranks(count, rows.sum(0, dtype=wide), group=group)
    return number, total


def _max_over_ranks(x: Tensor, group: Any) -> Tensor:
    """Elementwise; as it is without a process group."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return x
    x = x.clone()
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def _rows(x: Tensor, mask: Tensor) -> Tensor:
    """The mask of x's (..., K) rows, flat."""
    if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
        raise ValueError(f"mask {mask.dtype} {tuple(mask.shape)} does not fit rows of {tuple(x.shape)}: bool wanted")
    return mask.flatten()


def _check_temperature(temperature: float) -> None:
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: more than 0 wanted")
