"""The `agglom` command."""


def main() -> None:
    raise SystemExit(0)
