"""Images against words: an export's adaptor for an image-text teacher, and that teacher's text tower."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from agglom.errors import UserError
from agglom.features import InputSpec, TextTower

if TYPE_CHECKING:
    from agglom.export import Exported

READERS = ("tiny:clip", "open_clip:")  # sources whose text tower can be built again from their name alone


def zero_shot(
    exported: Exported,
    images: Tensor,
    texts: Sequence[str],
    *,
    adaptor: str | None = None,
    tower: TextTower | None = None,
    templates: str | Sequence[str] = ("{}",),
) -> Tensor:
    """See `Exported.zero_shot`."""
    from agglom.probes import classifier, read_templates

    if isinstance(texts, str) or not texts:
        raise UserError(f"zero_shot: texts {texts!r}; valid: a list of at least one text, such as ['a dog']")
    name = adaptor or _reader(exported, tower)
    summary = exported.adaptors[name](images).summary
    if summary is None:
        raise UserError(f"zero_shot: the adaptor for {name} has no summary; train it with summary_weight > 0")
    if tower is None:
        tower = exported.towers.get(name) or text_tower(name, exported.about["teachers"][name])
        exported.towers[name] = tower
    prompts = read_templates(templates)
    key = (tower, tuple(texts), prompts)  # the tower itself: its id may be another one's once it is gone
    if exported.words[0] != key:  # the same texts for batch after batch are embedded once
        exported.words = key, classifier(tower, texts, prompts).clone()  # no longer an inference tensor
    found = exported.words[1].to(summary.device)
    scale, bias = getattr(tower, "scale_and_bias", (1.0, 0.0))
    return scale * F.normalize(summary.float(), dim=1) @ found.T + bias


def text_tower(name: str, record: Mapping[str, Any]) -> TextTower:
    """The text tower of a teacher, from what an export keeps of it.

    Args:
        name: of the teacher, for messages.
        record: its entry of agglom.json.

    Raises:
        UserError: the source isn't a reference to a model with a text tower, the model can't be fetched, or it isn't
            the one that the student learnt from.
    """
    from agglom.teachers import fingerprint, from_ref

    source = record["source"]
    if not source.startswith(READERS):
        raise UserError(
            f"zero_shot: teacher {name} is {source!r}, which names no text tower; valid: tiny:clip, "
            f"open_clip:NAME/TAG; give tower=, such as agglom.teachers.OpenClipTeacher(name=..., checkpoint=...).text"
        )
    teacher = from_ref(source, dtype=record["dtype"])
    kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["input"].items()}
    # At another input size the weights themselves differ: their positions are resampled.
    if teacher.input == InputSpec(**kept) and fingerprint(teacher) != record["sha256"]:
        raise UserError(
            f"zero_shot: {source} has other weights now than the teacher {name} that the student learnt from; "
            f"give tower= with the old ones"
        )
    return teacher.text  # type: ignore[return-value]


def _reader(exported: Exported, tower: TextTower | None) -> str:
    """The adaptor to answer by: the only one with a summary, of those whose teacher has a text tower."""
    teachers = exported.about.get("teachers", {})
    having = [name for name, through in exported.adaptors.items() if through.adaptor.teacher.summary is not None]
    read = [name for name in having if str(teachers.get(name, {}).get("source", "")).startswith(READERS)]
    read = having if tower is not None and not read else read
    if len(read) != 1:
        raise UserError(
            f"zero_shot: {len(read)} of the adaptors ({', '.join(exported.adaptors) or 'none'}) are for a teacher "
            f"whose text tower is known; valid: 1; give adaptor=NAME, and tower= where the weights were a file"
        )
    return read[0]
