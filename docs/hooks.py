"""What mkdocs puts into pages from files that live elsewhere: recipes, the changelog, the README's results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Iterator

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIELD = re.compile(r"^# (\w+): +(.*)$")


def on_config(config: Any) -> Any:
    """Leave out pages of the navigation that aren't written yet; a page that it doesn't name goes into the guide."""
    there = {path.relative_to(HERE).as_posix() for path in HERE.rglob("*") if path.suffix in (".md", ".ipynb")}
    config.nav = _existing(config.nav, there)
    guide = next(entry["Guide"] for entry in config.nav if "Guide" in entry)
    guide += sorted(there - set(_named(config.nav)))
    return config


def _existing(nav: list[Any], there: set[str]) -> list[Any]:
    kept = []
    for entry in nav:
        title, target = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(target, list):
            kept.append({title: _existing(target, there)})
        elif target in there:
            kept.append(entry)
    return kept


def _named(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from _named(target) if isinstance(target, list) else (target,)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill the marks that a page has."""
    for mark, fill in FILLS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, fill())
    return markdown


def on_post_page(output: str, **_: Any) -> str:
    """Notebooks' pages without the script that would load diagrams, which there are none of, from elsewhere."""
    return re.sub(
        r"<script[^>]*>(?:(?!</script>).)*mermaid.esm(?:(?!</script>).)*</script>", "", output, flags=re.DOTALL
    )


def header(text: str) -> tuple[str, dict[str, str]]:
    """What a configuration's first comment says: its purpose, and its fields (Source, Differs, Needs, ...).

    Lines of a field that look like commands keep their line breaks.
    """
    lines = text.split("\nseed_everything", 1)[0].splitlines()
    lines = [line for line in lines if line.startswith("#")]
    purpose, fields, current = lines[0].removeprefix("# "), {}, ""
    for line in lines[1:]:
        found = FIELD.match(line)
        if found:
            current, value = found.groups()
            fields[current] = value
        elif not current:
            purpose += " " + line.removeprefix("#").strip()
        else:
            fields[current] += "\n" + line.removeprefix("#").strip()
    return purpose, fields


def recipes() -> str:
    """A section for each recipe: what its header says, and the whole file to unfold."""
    files = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
    full = [path for path in files if not path.stem.startswith("tiny_")]
    tiny = [path for path in files if path.stem.startswith("tiny_")]
    return "\n".join(["## In small", *map(_recipe, tiny), "## Full size", *map(_recipe, full)])


def _recipe(path: Path) -> str:
    text = path.read_text()
    purpose, fields = header(text)
    config = yaml.safe_load(text)
    teachers = ", ".join(f"`{name}`" for name in config["model"]["teachers"]) or "none"
    rows = [f"**{key}.** {_prose(value)}" for key, value in fields.items() if key not in ("Command", "Needs")]
    commands = [part for key in ("Needs", "Command") for part in fields.get(key, "").splitlines()]
    shell = [line for line in commands if line.startswith("agglom ")]
    said = " ".join(line for line in commands if not line.startswith("agglom "))
    if said:
        rows.insert(0, f"**Needs.** {_prose(said)}")
    block = "\n".join(["```bash", f"agglom check configs/recipes/{path.name}", *shell, "```"])
    whole = "\n".join(f"    {line}".rstrip() for line in ["```yaml", *text.rstrip().splitlines(), "```"])
    unfold = f'??? note "configs/recipes/{path.name}"\n\n{whole}'
    return "\n\n".join([f"### {path.stem}", purpose, f"**Teachers.** {teachers}", *rows, block, unfold, ""])


def _prose(text: str) -> str:
    joined = " ".join(text.split())
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", joined)


def changelog() -> str:
    """CHANGELOG.md without its title."""
    return (ROOT / "CHANGELOG.md").read_text().split("\n", 1)[1]


def results() -> str:
    """The README's results; links to files that the site hasn't got become their words."""
    text = (ROOT / "README.md").read_text()
    found = text.split("<!-- results -->")[1].split("<!-- /results -->")[0]
    return re.sub(r"\[([^\]]+)\]\((?!http)[^)]+\)", r"\1", found)


FILLS = {"<!-- recipes -->": recipes, "<!-- changelog -->": changelog, "<!-- results -->": results}
