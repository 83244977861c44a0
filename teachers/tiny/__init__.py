"""The embedded tiny zoo."""
