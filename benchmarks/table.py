"""Writes the tables of docs/benchmarks.md from the benchmarks' JSON files.

    python benchmarks/table.py FOLDER [--docs docs/benchmarks.md]

Everything below the marker line is replaced; what stands above it stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Callable, Sequence

MARKER = "<!-- below: written by `make bench` -->"
Found = dict[str, Any]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def step(found: Found) -> str:
    rows = [
        [
            case["name"], f"{case['agglom_ms']:.0f}", f"{case['bare_ms']:.0f}",
            f"{case['time_ratio']:.3f} ({case['low']:.3f}-{case['high']:.3f})", f"{case['cpu_ratio']:.3f}",
            f"{case['memory_ratio']:.3f}", str(case["host_syncs"]),
        ]
        for case in found["cases"]
    ]  # fmt: skip
    head = ["heads, precision", "agglom, ms", "bare, ms", "time (10-90 %)", "CPU time", "peak memory", "host syncs"]
    return f"{found['batch']} images of {found['size']} px, {found['rounds']} pairs of steps.\n\n{markdown(head, rows)}"


def cache(found: Found) -> str:
    rows = [
        [case["name"], f"{case['step_ms']:.0f}", f"{case['time_ratio']:.3f} ({case['low']:.3f}-{case['high']:.3f})"]
        for case in found["cases"]
    ]
    stored = [
        [
            row["dtype"],
            f"{row['bytes_per_image']:,.0f}",
            f"{row['images_per_second']:.0f}",
            f"{row['replay_error']:.1e}",
        ]
        for row in found["caches"]
    ]  # fmt: skip
    first = markdown(["features", "step, ms", "over student-only training (range)"], rows)
    return first + "\n\n" + markdown(["cache", "bytes an image", "written, images/s", "replay differs by"], stored)


def data(found: Found) -> str:
    rows = [
        [
            case["name"], str(case["workers"]), f"{case['images_per_s']:.0f}",
            "-" if case["name"] == "agglom" else f"{case['speedup']:.2f} ({case['low']:.2f}-{case['high']:.2f})",
        ]
        for case in found["cases"]
    ]  # fmt: skip
    return markdown(["loader", "workers", "images/s", "agglom's over it (range)"], rows)


def scale(found: Found) -> str:
    rows = [
        [
            case["name"], ", ".join(map(str, case["sizes"])), ", ".join(f"{ms:.0f}" for ms in case["cpu_ms"]),
            f"{case['exponent']:.3f}",
        ]
        for case in found["cases"]
    ]  # fmt: skip
    ranks, resident = found["ranks"], found["resident"]
    streamed = ", ".join(
        f"{mib:.0f} MiB after {count} images" for count, mib in zip(resident["images"], resident["mib"], strict=True)
    )
    return (
        markdown(["what grows", "sizes", "CPU ms", "exponent of the growth"], rows)
        + f"\n\nTwo gloo ranks on this machine: {ranks['speedup']:.2f} times the images/s of one (a step takes "
        f"{ranks['ms'][1]:.0f} ms instead of {ranks['ms'][0]:.0f} ms).\n\n"
        f"Highest resident memory: {streamed} ({resident['ratio']:.3f}x)."
    )


def startup(found: Found) -> str:
    rows = [
        [c["name"], f"{c['seconds']:.2f}", f"{c['low']:.2f}-{c['high']:.2f}", f"{c['cpu']:.2f}"] for c in found["cases"]
    ]
    return markdown(["until", "seconds", "range", "CPU seconds of the process"], rows)


PARTS: dict[str, tuple[str, str, Callable[[Found], str]]] = {  # file -> title, what was asked for, table
    "step": ("A training step against a bare loop", "time at most 1.03, peak memory at most 1.05, no host sync", step),
    "cache": ("Training from cached features", "cached at most 1.05 of student-only training", cache),
    "data": ("Reading images", "1.3 times PIL bicubic with one worker", data),
    "scale": ("Growth", "exponents of teachers and images within 0.05 of 1, resident memory at most 1.03x", scale),
    "startup": ("Start", "--help within 1 s, check within 6 s", startup),
}


def page(folder: Path) -> str:
    """All parts whose file is there."""
    out = []
    for name, (title, target, table) in PARTS.items():
        path = folder / f"{name}.json"
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        about = found["machine"]
        where = f"{about['cpu']}, {about['cores']} cores, {about['capability']}, torch {about['torch']}"
        out.append(
            f"## {title}\n\n`benchmarks/{name}.py`; asked for: {target}. Measured on {about['gpu'] or where}, load "
            f"{about['load']} at the start.\n\n{table(found)}\n"
        )
    return "\n".join(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--docs", type=Path, default=Path("docs/benchmarks.md"))
    args = parser.parse_args(arguments)
    text = args.docs.read_text()
    if MARKER not in text:
        raise SystemExit(f"{args.docs}: no line {MARKER!r}")
    args.docs.write_text(f"{text.split(MARKER)[0]}{MARKER}\n\n{page(args.folder)}")


if __name__ == "__main__":
    main()
