"""Recipes named after papers."""
