"""Image-text contrast beside or in place of frozen teachers: an image's summary meets its caption (CLIP, SigLIP)."""

from __future__ import annotations

import hashlib
import math
from typing import Any, Literal, Sequence, cast

import torch
from torch import Tensor, nn

from agglom.draws import generator
from agglom.errors import UserError, nearest
from agglom.features import Dims
from agglom.objectives.contrastive import own_caption_nearest, pairs, sigmoid_contrast, softmax_contrast
from agglom.selfdistill.base import Objective, Scene, When
from agglom.targets.moments import no_autocast
from agglom.teachers import Teacher

TEMPERATURES = {"softmax": 0.07, "sigmoid": 0.1}  # at the first step, as published
GREATEST_SCALE = 100.0  # of 1 / temperature, as in CLIP


class ImageText(Objective):
    """The student's summary of an image is near to its caption, and far from other captions.

    With a `Dino` entry beside it this is SILC; with that entry from 80 % of the steps on, SigLIP 2's last fifth. It
    reads the student's features of the view that all frozen teachers share, so no crop of `data.crops` and no colour
    jitter reaches it; `data.view` alone says how far that view is from the image (where captions speak of left and
    right, it should not flip). Learned are a projection of the summary into the space of the texts, the temperature,
    the sigmoid's bias and, if told, the text tower.

    Captions are compared by their token ids. Other images with an equal caption are left out of an image's sum, as
    positives and as negatives; an image without a caption takes no part and has loss 0. Of several captions of an image
    (one a line) each step draws one. The other captions are those of a micro-batch on all ranks, which must have
    equally many images; gradient accumulation adds none.

    The export holds the student alone: neither projection nor text tower are part of it.

    Sources: CLIP (2103.00020), SigLIP (2303.15343), SILC (2310.13355), SigLIP 2 (2502.14786).

    Args:
        student: widths of the student.
        text: a teacher with a text tower (OpenClipTeacher, TinyTeacher clip); its image tower is let go of. Frozen, it
            stays outside of checkpoint, average and optimiser.
        trainable: train the text tower too, from the weights that `text` comes with (`pretrained: false`: from none).
        loss: "softmax" over the batch (CLIP), or "sigmoid" of each pair (SigLIP).
        temperature: at the first step; left out: 0.07, for the sigmoid 0.1. It is learned, down to 0.01.
        bias: of the sigmoid at the first step; it is learned.
        weight: of the mean over images in the total.
        start: first optimiser step, or a fraction of the run.
        ramp: steps over which the weight grows.
        stop: the step from which it no longer runs.
        copy_average: see Objective.
        token: which summary token it reads.
        seed: of the draw among several captions.

    Raises:
        UserError: see Objective; a teacher without texts, an unknown loss, a temperature below 0.01, a token that there
            isn't.
    """

    needs = {"captions"}
    anchors = True

    def __init__(
        self,
        student: Dims,
        *,
        text: Teacher,
        trainable: bool = False,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        temperature: float | None = None,
        bias: float = -10.0,
        weight: float = 1.0,
        start: When = 0,
        ramp: int = 0,
        stop: When | None = None,
        copy_average: bool = False,
        token: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(student, weight=weight, start=start, ramp=ramp, stop=stop, copy_average=copy_average)
        tower: Any = getattr(text, "text", None)
        if tower is None:
            name = f"{type(text).__name__} {getattr(text, 'name', '')}".strip()
            raise UserError(f"text: {name} has no text tower; valid: OpenClipTeacher, or TinyTeacher clip; take one")
        if loss not in TEMPERATURES:
            raise UserError(f"loss: {loss!r}; {nearest(loss, TEMPERATURES)}; take one")
        temperature = TEMPERATURES[loss] if temperature is None else temperature
        if temperature < 1 / GREATEST_SCALE:
            raise UserError(f"temperature: {temperature}; valid: >= {1 / GREATEST_SCALE}; change it")
        if not 0 <= token < student.tokens:
            raise UserError(
                f"token: {token}; valid: 0 to {student.tokens - 1}, the student's summary tokens; change it"
            )
        assert student.summary is not None and text.summary_dim is not None
        self.teacher = text  # whose tokenizer is used; its network is outside of the module tree by its own doing
        self.encoder = None if trainable else text
        network = tower.network()
        if trainable:
            self.network = network.requires_grad_(True).train()
        else:
            self.__dict__["network"] = network  # the teacher's own, and as frozen
        self.project = nn.Linear(student.summary, text.summary_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        if loss == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.loss, self.token, self.seed = loss, token, seed
        self._last: dict[str, Tensor] = {}

    def shared(self) -> list[nn.Module]:
        """See Objective."""
        return [self.teacher] if self.encoder is None else [self.teacher, self.network]

    def no_weight_decay(self) -> set[str]:
        """Position embeddings of the text tower."""
        return {name for name, _ in self.named_parameters() if name.endswith("positional_embedding")}

    def forward(self, scene: Scene) -> Tensor:
        """See the class: (B,)."""
        if "txt" not in scene.batch:
            raise UserError(f"data.fields: no captions at step {scene.step}; valid: with txt; add it")
        captions = self._drawn(scene.batch["txt"], scene.key)
        ids = cast(Any, self.teacher).text.tokenize(captions)  # (B, length)
        counts = torch.tensor([caption != "" for caption in captions])
        summary = scene.features().summary[:, self.token]
        tokens, codes, counts = (x.to(summary.device, non_blocking=True) for x in (ids, _codes(ids), counts))
        if self.encoder is None:
            texts = self.network(tokens)
        else:
            with torch.no_grad(), no_autocast(tokens.device):
                texts = self.network(tokens)
        found = pairs(self.project(summary), texts, codes, counts)
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(GREATEST_SCALE))
        scale = self.log_scale.exp()
        self._last = {"temperature": 1 / scale.detach(), "own_caption_nearest": own_caption_nearest(found)}
        if self.loss == "softmax":
            return softmax_contrast(found, scale)
        self._last["bias"] = self.bias.detach().clone()
        return sigmoid_contrast(found, scale, self.bias)

    def _drawn(self, texts: Sequence[str], key: tuple[object, ...]) -> list[str]:
        """One of the captions of each image, "" where it has none."""
        each = [[line for line in text.splitlines() if line.strip()] or [""] for text in texts]
        draws = torch.rand(len(each), generator=generator(self.seed, *key)).tolist()
        return [lines[int(draw * len(lines))] for lines, draw in zip(each, draws, strict=True)]

    def diagnosis(self) -> dict[str, Tensor]:
        """Temperature, the sigmoid's bias, and the share of images to which no other caption is nearer than its own."""
        return dict(self._last)


def _codes(tokens: Tensor) -> Tensor:
    """(B, length) token ids -> (B,) int64 on the host, equal for equal rows on every rank."""
    rows = tokens.numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
