"""Small evaluations of a frozen backbone, and the report."""

if __name__ == "probes":
    raise ImportError("import agglom.probes, not probes: this folder is part of the agglom package")
