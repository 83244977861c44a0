"""What a batch becomes on its device: pixels travel as uint8, colours may be left to where a whole batch is changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agglom.data.colours import change_batch


def arrived(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `image` (B, 3, H, W) and each of `crops` (B, V, 3, s, s) as floats in [0, 1].

    Recipes that came along (`colours`, `crops.KIND_colours`) are carried out, and gone then.
    """
    batch = dict(batch)
    batch["image"] = _seen(batch["image"], batch.pop("colours", None))
    if "crops" in batch:
        crops = batch["crops"]
        kinds = [kind for kind in crops if not kind.endswith("_colours")]
        batch["crops"] = {kind: _seen(crops[kind], crops.get(f"{kind}_colours")) for kind in kinds}
    return batch


def _seen(images: Tensor, packed: Tensor | None) -> Tensor:
    if not images.is_floating_point():
        images = images.float().div_(255)
    if packed is None:
        return images
    return change_batch(images.flatten(0, -4), packed.flatten(0, -2)).view(images.shape)
