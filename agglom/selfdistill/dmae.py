"""Masked feature distillation (DMAE): student and teacher encode the same few patches, the teacher only in part."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.models import VisionTransformer
from torch import Tensor, nn

from agglom.draws import generator
from agglom.errors import UserError, nearest
from agglom.features import Dims, prepare, resize, sides
from agglom.objectives.pointwise import EPS
from agglom.selfdistill.base import Objective, Scene, When
from agglom.teachers import Teacher


class Dmae(Objective):
    """Both encoders see only the visible patches of a random mask, and the student predicts the teacher's block.

    The teacher is run up to the block that is read and no further, so at three quarters of masking and of depth a step
    costs a fifth of the two full encoders. Tokens (class token included) are compared as unit vectors. There is no
    decoder of pixels: with 1 - cos in place of the mean absolute difference, which is tiny between unit vectors, there
    is nothing that it would have to balance.

    Source: DMAE, 2208.12256.

    Args:
        student: widths of the student.
        encoder: the frozen teacher: a timm ViT with absolute positions and the student's grid. It isn't one of
            `model.teachers`, whose full forward pass is what this avoids.
        weight: of the mean over images in the total.
        start: first optimiser step, or a fraction of the run.
        ramp: steps over which the weight grows.
        stop: the step from which it no longer runs.
        copy_average: see Objective.
        ratio: part of the patches that neither sees.
        student_block: index of the student's block that predicts; left out: three quarters deep.
        teacher_block: index of the teacher's block that is predicted; left out: three quarters deep.
        distance: "cosine": 1 - cos a token. "l1": the paper's mean absolute difference, times the width.
        seed: of the masks.

    Raises:
        UserError: see Objective; a teacher that can't leave patches out (windowed, convolutional, without absolute
            positions), a block past the depth, a ratio outside [0, 1).
    """

    anchors = True
    partial = True  # blocks past `student_block` get no gradient

    def __init__(
        self,
        student: Dims,
        *,
        encoder: Teacher,
        weight: float = 1.0,
        start: When = 0,
        ramp: int = 0,
        stop: When | None = None,
        copy_average: bool = False,
        ratio: float = 0.75,
        student_block: int | None = None,
        teacher_block: int | None = None,
        distance: Literal["cosine", "l1"] = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__(student, weight=weight, start=start, ramp=ramp, stop=stop, copy_average=copy_average)
        if not 0 <= ratio < 1:
            raise UserError(f"ratio: {ratio}; valid: 0 <= ratio < 1; change it")
        if distance not in ("cosine", "l1"):
            raise UserError(f"distance: {distance!r}; {nearest(distance, ('cosine', 'l1'))}; take one")
        self.needs = {"patches"}
        self.encoder = encoder  # frozen, and outside of the module tree by its own doing
        network = vit(encoder)
        if network is None:
            raise UserError(
                f"encoder: {type(encoder).__name__} is no plain timm ViT with absolute positions, and only these can "
                f"leave patches out; valid: such as vit_large_patch16_224.mae; take another"
            )
        depths = {"student": student.depth, "teacher": len(network.blocks)}
        chosen = {"student": student_block, "teacher": teacher_block}
        self.blocks: dict[str, int] = {}
        for name, depth in depths.items():
            block = chosen[name]
            block = max(0, round(0.75 * depth) - 1) if block is None else block
            if not -depth <= block < depth:
                raise UserError(f"{name}_block: {block}; valid: {-depth} to {depth - 1}; change it")
            self.blocks[name] = block % depth
        assert student.spatial is not None
        self.project = nn.Linear(student.spatial, network.embed_dim)
        self.ratio, self.distance, self.seed = ratio, distance, seed

    def shared(self) -> list[nn.Module]:
        """See Objective."""
        return [self.encoder]

    def forward(self, scene: Scene) -> Tensor:
        """See the class: (B,)."""
        view, _ = scene.frame("")
        backbone = cast(Any, scene.student).backbone
        if not isinstance(backbone, VisionTransformer):
            raise UserError(f"{type(backbone).__name__} can't leave patches out; valid: a timm ViT as the student")
        spec, network = self.encoder.input, cast(VisionTransformer, vit(self.encoder))
        grid = cast(Any, scene.student).input.grid(sides(view))
        seen = (
            resize(view, (grid[0] * spec.stride, grid[1] * spec.stride), spec.interpolation)
            if spec.size is None
            else view
        )
        if spec.grid(sides(seen)) != grid:
            raise UserError(
                f"encoder: its grid {spec.grid(sides(seen))} is not the student's {grid}, and both must see the same "
                f"patches; valid: input_size: any, or {grid[0] * spec.stride}"
            )
        visible = self._visible(len(view), grid[0] * grid[1], scene.key).to(view.device, non_blocking=True)
        kind = view.device.type if torch.amp.is_autocast_available(view.device.type) else "cpu"
        with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=self.encoder.dtype == "bf16"):
            pixels = prepare(seen.float(), spec)
            target = encode_visible(network, pixels, visible, self.blocks["teacher"]).float()
        pixels = prepare(view, cast(Any, scene.student).input)
        ours = self.project(encode_visible(backbone, pixels, visible, self.blocks["student"])).float()
        ours, target = (_comparable(x, v) for x, v in ((ours, backbone), (target, network)))
        if ours.shape[1] != target.shape[1]:  # only one of them has a class token
            ours, target = ours[:, -visible.shape[1] :], target[:, -visible.shape[1] :]
        if self.distance == "cosine":
            return (1 - F.cosine_similarity(ours, target, dim=2, eps=EPS)).mean(1)
        return (F.normalize(ours, dim=2, eps=EPS) - F.normalize(target, dim=2, eps=EPS)).abs().sum(2).mean(1)

    def _visible(self, count: int, patches: int, key: tuple[object, ...]) -> Tensor:
        """(B, K) rising indices of the patches that both see, K = int(N (1 - ratio)), from seed and key."""
        kept = max(1, int(patches * (1 - self.ratio) + 1e-6))
        return torch.rand(count, patches, generator=generator(self.seed, *key)).argsort(1)[:, :kept].sort(1).values


def vit(encoder: Teacher) -> VisionTransformer | None:
    """The plain ViT inside a teacher, if it is one: global attention, positions added to its patches."""
    for network in encoder.networks.values():
        if isinstance(network, VisionTransformer) and network.pos_embed is not None:
            return network
    return None


def encode_visible(network: VisionTransformer, pixels: Tensor, visible: Tensor, block: int) -> Tensor:
    """Tokens after a block, of the visible patches alone; later blocks are not run.

    Positions are added before patches are left out, so each keeps its own.

    Args:
        network: timm's ViT.
        pixels: (B, 3, H, W), prepared.
        visible: (B, K) indices of patches.
        block: index of the last block that is run.

    Returns:
        (B, P + K, D): the P prefix tokens, then the visible patches; before the final norm.
    """
    x = network._pos_embed(network.patch_embed(pixels))
    first, patches = x[:, : network.num_prefix_tokens], x[:, network.num_prefix_tokens :]
    patches = patches.gather(1, visible.unsqueeze(2).expand(-1, -1, patches.shape[2]))
    x = network.norm_pre(torch.cat([first, patches], 1))
    for layer in list(network.blocks)[: block + 1]:
        x = layer(x)
    return x


def _comparable(tokens: Tensor, network: VisionTransformer) -> Tensor:
    """(B, P + K, D) -> class token, where there is one, and patches; no registers."""
    patches = tokens[:, network.num_prefix_tokens :]
    return torch.cat([tokens[:, :1], patches], 1) if network.cls_token is not None else patches
