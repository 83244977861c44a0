"""Shards, views, the data module and the embedded data set."""
