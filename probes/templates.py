"""Prompt templates of zero-shot classification, by name, from a file, or as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from agglom.errors import UserError

SIMPLE = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "an image with a {}")

# eight ways of looking at one thing, ten templates each: kind of picture, framing, number and size, light and weather,
# quality, place and use, rendition, and who looks
FULL = (
    "a photo of one {}.",
    "a colour photo that shows a {}.",
    "a photo in black and white, showing a {}.",
    "a snapshot with a {} in it.",
    "a holiday photo with a {}.",
    "a studio shot of a single {}.",
    "a picture from a catalogue: a {}.",
    "a press photo of the {}.",
    "a frame from a video with a {}.",
    "a scanned print that shows the {}.",
    "a {} seen from close by.",
    "a {} seen from far away.",
    "a {} seen from above.",
    "a {} seen from behind.",
    "a {} seen from the side.",
    "a {} in the middle of the picture.",
    "a {} at the edge of the picture.",
    "a picture filled by a {}.",
    "a {} that is partly hidden.",
    "a detail of the {}.",
    "a very small {}.",
    "a very large {}.",
    "a pair of them: {}.",
    "a group that includes a {}.",
    "several of the kind {}.",
    "a {} all by itself.",
    "a {} among other things.",
    "a {} next to a person.",
    "an old {}.",
    "a brand new {}.",
    "a {} in bright daylight.",
    "a {} at night.",
    "a {} in the shade.",
    "a {} against the light.",
    "a {} under a lamp.",
    "a {} in fog.",
    "a {} in the rain.",
    "a {} in snow.",
    "an evening picture of the {}.",
    "an underexposed picture of the {}.",
    "a sharp picture of a {}.",
    "a blurred picture of a {}.",
    "a noisy picture of a {}.",
    "a picture of a {} in few pixels.",
    "a heavily compressed picture of the {}.",
    "a carelessly cropped picture of the {}.",
    "a tilted picture of the {}.",
    "a picture with faded colours of the {}.",
    "a very good picture of a {}.",
    "a poor picture of a {}.",
    "a {} indoors.",
    "a {} outdoors.",
    "a {} in the street.",
    "a {} in the countryside.",
    "a {} by the water.",
    "a {} on a table.",
    "a {} on a plain background.",
    "a {} in cluttered surroundings.",
    "a {} in everyday use.",
    "a {} on display.",
    "a drawing of a {}.",
    "a pencil sketch of the {}.",
    "an oil painting with a {}.",
    "a watercolour of the {}.",
    "a comic strip with a {}.",
    "a child's drawing of the {}.",
    "a computer graphic of a {}.",
    "a paper model of the {}.",
    "a pattern made of the motif {}.",
    "a sculpture in the form of a {}.",
    "here we see a {}.",
    "this is what a {} looks like.",
    "the subject of this picture is a {}.",
    "somebody took a picture of their {}.",
    "a typical example of a {}.",
    "an unusual example of a {}.",
    "an encyclopedia's picture of the {}.",
    "an amateur's picture of some {}.",
    "a picture in which one can find a {}.",
    "a well-known {}.",
)

TEMPLATES = {"simple": SIMPLE, "full": FULL}


def read_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """A name in `TEMPLATES`, a text file with one template a line, or templates themselves.

    Raises:
        UserError: neither a name nor a file, no template at all, or one without exactly one {}.
    """
    if isinstance(templates, str):
        if templates in TEMPLATES:
            return TEMPLATES[templates]
        path, where = Path(templates), f"templates: {templates}"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as err:
            raise UserError(
                f"{where!r}; valid: {', '.join(TEMPLATES)}, or a text file with one template a line"
            ) from err
        some = [line.strip() for line in lines if line.strip()]
    else:
        some, where = list(templates), "templates"
    bad = next((t for t in some if t.count("{}") != 1), None)
    if bad is not None or not some:
        raise UserError(f"{where}: {bad!r}; valid: at least one, each with one {{}} for the class name")
    return tuple(some)
