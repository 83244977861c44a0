"""The README's and the documentation's own words: YAML passes the check, files exist, tables name everything."""

import re
from pathlib import Path

import pytest
import yaml

from agglom.checks import check_config, numbers, read_yaml
from agglom.cli import COMMANDS, main
from agglom.probes import PROBES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language, text=TEXT):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page, capsys):
    text = page.read_text()
    prose = re.sub(r"`[^`\n]+`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (page.parent / target).exists(), target
    helps = {}
    for name, rest in re.findall(r"^agglom (\S+) (.*)$", "\n".join(blocks("bash", text)), re.MULTILINE):
        assert name in COMMANDS, name
        for path in re.findall(r"configs/\S+\.yaml", rest):
            assert (ROOT / path).is_file(), path
        if name in ("probe", "export", "cache", "report"):
            if name not in helps:
                with pytest.raises(SystemExit):
                    main([name, "--help"])
                helps[name] = capsys.readouterr().out
            for option in re.findall(r"(?<= )--\w+", rest.split("#")[0]):
                assert option in helps[name], f"{name} {option}"


def test_every_probe_is_in_the_table_of_probes():
    assert set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "probes.md").read_text(), re.MULTILINE)) == set(PROBES)


def test_probes_while_training_pass_the_check():
    config = read_yaml(ROOT / "configs" / "demo.yaml")[0]
    (text,) = blocks("yaml", (ROOT / "docs" / "probes.md").read_text())
    config["trainer"] |= yaml.safe_load(text)["trainer"]
    config["data"]["data"] = "nowhere"
    assert [line.split(": ")[0] for line in check_config(config)] == ["data.data"]


def test_the_demo_is_the_file_without_its_comments():
    shown = next(yaml.safe_load(block) for block in blocks("yaml") if "model:" in block)
    whole = read_yaml(ROOT / "configs" / "demo.yaml")[0]

    def within(part, full):
        return all(within(v, full[k]) if isinstance(v, dict) else full[k] == v for k, v in part.items())

    assert within(numbers(shown), whole)


def test_the_stages_pass_the_check():
    config = read_yaml(ROOT / "configs" / "demo.yaml")[0]
    config |= next(yaml.safe_load(block) for block in blocks("yaml") if block.startswith("stages:"))
    config["model"]["student"]["init_args"] = {
        "name": "vit_tiny_patch16_224", "kwargs": {"img_size": 64, "depth": 4, "dynamic_img_size": True},
    }  # fmt: skip
    config["model"]["remember_teachers"] = False
    config["trainer"]["accumulate_grad_batches"] = 2
    config["data"]["data"] = "nowhere"
    assert [line.split(": ")[0] for line in check_config(config)] == ["data.data"]


def test_every_recipe_is_in_the_table():
    listed = re.findall(r"^\| (?:`(\w+)`|-) \| `(\w+)` \|", TEXT, re.MULTILINE)
    files = {path.stem for path in (ROOT / "configs" / "recipes").glob("*.yaml")}
    assert {name for row in listed for name in row if name} == files
