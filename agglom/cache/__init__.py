"""Teachers' features on disk, for exactly the views that they saw, so that training need not run the teachers."""

from agglom.cache.layout import CacheIndex, Miss, read_cache_index
from agglom.cache.read import FeatureReader
from agglom.cache.write import Plan, dry_run, write_cache

__all__ = ["CacheIndex", "FeatureReader", "Miss", "Plan", "dry_run", "read_cache_index", "write_cache"]
