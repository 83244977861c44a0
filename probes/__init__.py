"""Small evaluations of a frozen backbone, and the report."""

if __name__ == "probes":
    raise ImportError("import agglom.probes, not probes: this folder is part of the agglom package")

from agglom.probes.base import Probe, Result, Subject
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.gather import splits_of
from agglom.probes.knn import KnnProbe
from agglom.probes.linear import LinearProbe
from agglom.probes.report import read_report, write_comparison, write_report
from agglom.probes.runner import PROBES, run_probes
from agglom.probes.segmentation import SegmentationProbe
from agglom.probes.zeroshot import TEMPLATES, ZeroShotProbe

__all__ = [
    "PROBES",
    "TEMPLATES",
    "FeatureSet",
    "KnnProbe",
    "LinearProbe",
    "Probe",
    "Result",
    "SegmentationProbe",
    "Subject",
    "Targets",
    "ZeroShotProbe",
    "read_report",
    "run_probes",
    "splits_of",
    "write_comparison",
    "write_report",
]
