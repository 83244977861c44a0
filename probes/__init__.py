"""Small evaluations of a frozen backbone, and the report."""

if __name__ == "probes":
    raise ImportError("import agglom.probes, not probes: this folder is part of the agglom package")

from agglom.probes.base import Probe, Result, Subject
from agglom.probes.detection import DetectionProbe
from agglom.probes.embed import write_embeddings
from agglom.probes.features import FeatureSet, Targets
from agglom.probes.fidelity import FidelityProbe
from agglom.probes.fingerprint import weights_hash
from agglom.probes.gather import splits_of
from agglom.probes.geometry import GeometryProbe
from agglom.probes.knn import KnnProbe
from agglom.probes.linear import LinearProbe
from agglom.probes.linear_sgd import LinearSgdProbe
from agglom.probes.markdown import clean, grid, retention_table
from agglom.probes.measure import PROBES
from agglom.probes.report import read_report, write_comparison, write_report
from agglom.probes.retrieval import RetrievalProbe
from agglom.probes.retrieval_linear import LinearRetrievalProbe
from agglom.probes.runner import run_probes
from agglom.probes.segmentation import SegmentationProbe
from agglom.probes.segmentation_sgd import SegmentationSgdProbe
from agglom.probes.templates import TEMPLATES, read_templates
from agglom.probes.zeroshot import ZeroShotProbe, classifier

__all__ = [
    "PROBES",
    "TEMPLATES",
    "DetectionProbe",
    "FeatureSet",
    "FidelityProbe",
    "GeometryProbe",
    "KnnProbe",
    "LinearProbe",
    "LinearRetrievalProbe",
    "LinearSgdProbe",
    "Probe",
    "Result",
    "RetrievalProbe",
    "SegmentationProbe",
    "SegmentationSgdProbe",
    "Subject",
    "Targets",
    "ZeroShotProbe",
    "classifier",
    "clean",
    "grid",
    "read_report",
    "read_templates",
    "retention_table",
    "run_probes",
    "splits_of",
    "weights_hash",
    "write_comparison",
    "write_embeddings",
    "write_report",
]
