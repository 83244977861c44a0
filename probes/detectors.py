"""torchvision's detectors over a `DetectionBackbone`, for images of one canvas."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from agglom.detection import Anchors, DetectionBackbone

Kind = Literal["fcos", "fasterrcnn"]
KINDS = ("fcos", "fasterrcnn")
SCORE = 0.05  # detections below count as none


def build_detector(kind: Kind, backbone: DetectionBackbone, classes: int, *, convs: int = 4) -> nn.Module:
    """A detector that leaves pixels as they are. Labels of "fasterrcnn" begin at 1, as 0 is its background.

    Args:
        kind: "fcos": one stage without anchor boxes (Tian et al. 2019). "fasterrcnn": two stages (Ren et al. 2015).
        backbone: for "fasterrcnn" with the pooled map.
        classes: K.
        convs: convolutions in each of FCOS's two towers.
    """
    detector: nn.Module
    if kind == "fcos":
        head, anchors = FCOSHead(backbone.out_channels, 1, classes, convs), Anchors(backbone.strides)
        detector = FCOS(backbone, classes, anchor_generator=anchors, head=head, score_thresh=SCORE)
    else:
        detector = FasterRCNN(
            backbone,
            classes + 1,
            rpn_anchor_generator=Anchors(backbone.strides, scale=8, ratios=(0.5, 1.0, 2.0)),
            box_roi_pool=MultiScaleRoIAlign([str(i) for i in range(len(backbone.strides) - 1)], 7, 2),
            box_score_thresh=SCORE,
        )
    detector.transform = AsTheyAre()
    return detector


class AsTheyAre(GeneralizedRCNNTransform):
    """Images of one size into a batch, untouched: torchvision's own can't be kept from resizing in eval mode."""

    def __init__(self) -> None:
        super().__init__(1, 1, image_mean=[0.0] * 3, image_std=[1.0] * 3, size_divisible=1)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Both as they are."""
        return image, target
