"""Run configurations, readable through importlib.resources.files('agglom.configs')."""

if __name__ == "configs":
    raise ImportError("import agglom.configs, not configs: this folder is part of the agglom package")
