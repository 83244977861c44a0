"""Tests of this folder share `broken.py`."""

import sys
from pathlib import Path

import pytest

from agglom.data import addresses

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def other_addresses(monkeypatch):
    """Commands, and files in memory in the place of an object store."""
    monkeypatch.setenv(addresses.ALLOW_PIPE, "1")
    monkeypatch.setattr(addresses, "SCHEMES", (*addresses.SCHEMES, "memory"))
