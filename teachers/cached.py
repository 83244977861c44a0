"""A teacher whose features were computed before: it keeps the contract, and is built only if it has to look itself."""

from __future__ import annotations

import logging
from typing import Any, Mapping, Sequence

from torch import Tensor

from agglom.errors import UserError, nearest
from agglom.features import Answer, Features, InputSpec, pooled
from agglom.teachers.base import Teacher

log = logging.getLogger("agglom.teachers")


class CachedTeacher(Teacher):
    """Stands for a teacher of a feature cache (`agglom cache`): same dims, input, source and licence.

    What is in the cache comes with the batch. For images that are not (validation without cached features, or
    `data.cache_missing: recompute`) the teacher itself is built and run; the log says so at the first.

    Args:
        cache: folder of the cache.
        name: of the teacher in it.

    Raises:
        UserError: no cache there, or no such teacher in it.
    """

    def __init__(self, *, cache: str, name: str) -> None:
        super().__init__()
        from agglom.cache import read_cache_index

        index = read_cache_index(cache)
        if name not in index.teachers:
            raise UserError(
                f"CachedTeacher: {cache} has no teacher {name!r}; {nearest(name, index.teachers)}; take one"
            )
        entry: Mapping[str, Any] = index.teachers[name]
        self.cache, self.name, self.entry = cache, name, dict(entry)
        self.sha256 = str(entry["sha256"])
        self.source, self.licence, self.dtype = str(entry["source"]), str(entry["licence"]), entry["dtype"]
        spec = dict(entry["input"])
        for key in ("mean", "std", "size"):
            spec[key] = None if spec[key] is None else tuple(spec[key])
        self.input = InputSpec(**spec)
        self.summary_dim, self.spatial_dim = entry["dims"]["summary"], entry["dims"]["spatial"]
        self.pool, self.recomputed = index.pool, 0

    def original(self) -> Teacher:
        """The teacher itself, built when it is first asked for.

        Raises:
            UserError: it can't be built, or has other weights than the cache's.
        """
        if "_original" not in self.__dict__:
            from agglom.schema import find_class
            from agglom.teachers.provenance import fingerprint

            path, options = self.entry["class_path"], dict(self.entry["init_args"])
            cls = find_class(path, Teacher)
            if cls is None or not issubclass(cls, Teacher) or issubclass(cls, CachedTeacher):
                raise UserError(f"{self.cache}: teacher {self.name}: class {path!r}; valid: a Teacher; write it again")
            built = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
            if fingerprint(built) != self.sha256:
                raise UserError(
                    f"{self.cache}: teacher {self.name} has other weights now ({built.source}) than when its features "
                    "were computed; write the cache again"
                )
            self.__dict__["_original"] = built
        return self.__dict__["_original"]

    def answer(self, images: Tensor, **options: Any) -> Answer:
        """By the teacher itself."""
        if not self.recomputed:
            log.warning("teacher %s: images without cached features; the teacher itself is run on them", self.name)
        self.recomputed += len(images)
        return self.original().to(images.device).answer(images, **options)

    def encode(self, pixels: Tensor) -> Features:
        """By the teacher itself."""
        return self.original().encode(pixels)

    def recall(self, images: Tensor, *, features: Mapping[str, Tensor], there: Sequence[bool]) -> Features:
        """A batch's features as they came with it, float32; for images that have none the teacher itself is run.

        Args:
            images: (B, 3, H, W) in [0, 1], the views that the features are of.
            features: summary (B, D) and spatial (B, C, h, w), as stored.
            there: B times, whether an image has any.
        """
        device = images.device
        parts = {kind: value.to(device, non_blocking=True).float() for kind, value in features.items()}
        lacking = [row for row, ok in enumerate(there) if not ok]
        if lacking:
            fresh = pooled(self.answer(images[lacking]).features, self.pool)
            for value, new in zip((parts.get("summary"), parts.get("spatial")), fresh, strict=True):
                if value is not None and new is not None:
                    value[lacking] = new
        return Features(parts.get("summary"), parts.get("spatial"))
