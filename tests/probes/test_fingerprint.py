"""A model's fingerprint follows its weights, for teachers too, which hide their parameters from everybody else."""

import torch
from torch import nn

from agglom.probes.fingerprint import weights_hash
from agglom.teachers import TinyTeacher


def test_a_teachers_weights_count():
    torch.manual_seed(0)
    first, second = TinyTeacher("sam", pretrained=False), TinyTeacher("sam", pretrained=False)
    assert weights_hash(first) == weights_hash(first)
    assert len({weights_hash(first), weights_hash(second), weights_hash(TinyTeacher("sam"))}) == 3


def test_one_value_changes_it():
    module = nn.Linear(3, 2)
    before = weights_hash(module)
    with torch.no_grad():
        module.bias[0] += 1
    assert weights_hash(module) != before
