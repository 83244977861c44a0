"""Objectives beside the frozen teachers: what the student's own average, and more views of an image, can teach it."""

from agglom.selfdistill.base import Objective, Scene
from agglom.selfdistill.dino import Dino
from agglom.selfdistill.dmae import Dmae
from agglom.selfdistill.gram import GramAnchor
from agglom.selfdistill.image_text import ImageText
from agglom.selfdistill.mesa import Mesa

__all__ = ["Dino", "Dmae", "GramAnchor", "ImageText", "Mesa", "Objective", "Scene"]
