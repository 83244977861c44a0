"""The ladder (UNIC): several student blocks read by one perceptron each, their outputs summed into one prediction."""

from __future__ import annotations

from itertools import groupby
from typing import Sequence, cast

from torch import Tensor, nn

from agglom.adaptors.base import Adaptor, to_map, to_tokens, trunc_normal
from agglom.adaptors.rungs import sum_of_rungs
from agglom.errors import UserError
from agglom.features import Dims, Features, StudentFeatures, align


class LadderHead(nn.Module):
    """Rungs x_r (M, d_r) -> sum over r of W2_r GELU(W1_r x_r + b1_r), plus b2: (M, D).

    The W2_r lie side by side in one Linear, `last`, so that their products and the sum are one product, and a
    normaliser folds into one layer. The b2_r of the formula are one bias, which says the same.
    """

    def __init__(self, widths: Sequence[int], hidden: Sequence[int], out: int, *, recompute: bool) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(d, h) for d, h in zip(widths, hidden, strict=True))
        self.last = nn.Linear(sum(hidden), out)
        self.starts = [sum(hidden[:r]) for r in range(len(hidden))]
        self.recompute = recompute
        self.apply(trunc_normal)

    def forward(self, rungs: Sequence[Tensor], start: int = 0) -> Tensor:
        """Rungs `start`, `start` + 1, ... (..., d_r) on one grid -> their sum (..., D); rung 0 brings the bias."""
        layers = cast("list[nn.Linear]", list(self.first)[start : start + len(rungs)])
        columns = self.last.weight
        if len(layers) < len(self.first):  # the whole is not sliced: a slice's gradient is one more matrix
            left = self.starts[start]
            columns = columns[:, left : left + sum(layer.out_features for layer in layers)]
        out = sum_of_rungs(
            [x.flatten(0, -2) for x in rungs],
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            columns,
            self.last.bias if start == 0 else None,
            recompute=self.recompute,
        )
        return out.unflatten(0, rungs[0].shape[:-1])


class LadderAdaptor(Adaptor):
    """UNIC's ladder of perceptrons, for summary and spatial separately: one sum, so one loss, whatever the rungs.

    Every rung reads one block's output. The last block's is the student's own output, after its final norm, which so
    learns; UNIC reads that block too before the norm and leaves the norm untrained (`raw_last`). No norm inside. Where
    blocks differ in grid (CNNs), each rung works at its own and its output is aligned to the last block's, then summed.
    At width 768 the default ratios are UNIC's hidden widths of 768 and 3072, which are fixed numbers there.

    Args:
        student: widths, tokens and depth of the student.
        teacher: widths of the teacher.
        token: which of the student's summary tokens is this teacher's.
        tap_names: the student's blocks that can be tapped, first to last.
        rungs: indices of the blocks to read, negative ones from the end; left out: all.
        ratio: hidden width of a rung over the width of its block.
        last_ratio: the same for the last rung.
        raw_last: read the last block before the student's final norm too, as UNIC does.
        recompute: compute hidden units again in the backward pass instead of keeping them: about a sixth more
            arithmetic, next to no memory.

    Raises:
        UserError: a rung past the depth, or named twice.
    """

    def __init__(
        self,
        student: Dims,
        teacher: Dims,
        token: int = 0,
        tap_names: Sequence[str] = (),
        *,
        rungs: Sequence[int] | None = None,
        ratio: float = 1.0,
        last_ratio: float = 4.0,
        raw_last: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(student, teacher, token, tap_names)
        depth = len(self.tap_names)
        blocks = _indices(rungs, depth)
        outputs = [block == depth - 1 and not raw_last for block in blocks]
        # None stands for the student's output.
        self.reads = [None if output else self.tap_names[block] for block, output in zip(blocks, outputs, strict=True)]
        self.taps = tuple(name for name in self.reads if name is not None)

        def head(kind: int, own: int | None, out: int | None) -> LadderHead | None:
            if own is None or out is None:
                return None
            widths = [
                own if output or not student.taps else student.taps[block][kind]
                for block, output in zip(blocks, outputs, strict=True)
            ]
            ratios = [ratio] * (len(widths) - 1) + [last_ratio]
            hidden = [max(1, round(r * width)) for r, width in zip(ratios, widths, strict=True)]
            return LadderHead(widths, hidden, out, recompute=recompute)

        self.summary = head(0, student.summary, teacher.summary)
        self.spatial = head(1, student.spatial, teacher.spatial)

    def project(self, student: StudentFeatures) -> Features:
        blocks = [
            (student.summary, student.spatial) if name is None else student.taps[name]
            for name in self.reads
        ]  # fmt: skip
        summary = spatial = None
        if self.summary is not None:
            summary = self.summary([tokens[:, self.token] for tokens, _ in blocks])
        if self.spatial is not None:
            spatial = self._spatial(self.spatial, [x for _, x in blocks], student.spatial.shape[-2:])
        return Features(summary, spatial)

    @staticmethod
    def _spatial(head: LadderHead, maps: Sequence[Tensor], grid: Sequence[int]) -> Tensor:
        """Rungs of one grid are summed in one go (a ViT's all); the sums are aligned to `grid` and added."""
        sums, start = [], 0
        for here, group in groupby(maps, key=lambda x: x.shape[-2:]):
            rungs = [to_tokens(x) for x in group]
            sums.append(align(to_map(head(rungs, start), here), (grid[0], grid[1])))
            start += len(rungs)
        return sum(sums[1:], sums[0])

    def last_linears(self) -> dict[str, nn.Linear | nn.Conv2d | None]:
        return {
            "summary": None if self.summary is None else self.summary.last,
            "spatial": None if self.spatial is None else self.spatial.last,
        }


def _indices(rungs: Sequence[int] | None, depth: int) -> list[int]:
    """Rungs as sorted indices from 0; a student without taps has one rung, its output (-1)."""
    if rungs is None:
        return list(range(depth)) or [-1]
    past = [rung for rung in rungs if not -depth <= rung < depth]
    if past:
        raise UserError(f"rungs: {past[0]}; the student has {depth} blocks, valid: {-depth} to {depth - 1}")
    chosen = sorted(rung % depth for rung in rungs)
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(
            f"rungs: {list(rungs)}; name each block once, at least one, or leave the key out for all {depth}"
        )
    return chosen
