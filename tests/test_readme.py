"""The README's own words: its YAML passes the check, its files exist, its table names every recipe."""

import re
from pathlib import Path

import yaml

from agglom.checks import check_config, numbers, read_yaml
from agglom.cli import COMMANDS

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_links_and_files_exist():
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose):
        assert (ROOT / target).exists(), target
    for command in re.findall(r"^agglom (\S+) (.*)$", "\n".join(blocks("bash")), re.MULTILINE):
        assert command[0] in COMMANDS, command
        for path in re.findall(r"configs/\S+\.yaml", command[1]):
            assert (ROOT / path).is_file(), path


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
