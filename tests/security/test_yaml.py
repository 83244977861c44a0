"""Configurations made to run something, to grow, or to be none: one line each, in time, and nothing runs."""

import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malice import YAMLS

from agglom.checks import check_file
from agglom.errors import UserError
from agglom.overrides import stated
from agglom.yaml_files import MAX_VALUES, check_interpolations, parse


def put(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("name", [name for name in YAMLS if name != "a key twice"])  # whose lines are many
def test_check_says_one_line(here, refused, name):
    put(here / "c.yaml", YAMLS[name])
    started = time.monotonic()
    line = refused("check", "c.yaml")
    assert line.startswith("c.yaml: ") and "\n" not in line and len(line) < 400
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("name", YAMLS)
def test_fit_refuses_before_anything_is_built(here, refused, name):
    put(here / "c.yaml", YAMLS[name])
    assert "c.yaml: " in refused("fit", "--config", "c.yaml")


@pytest.mark.parametrize("name", ["python/object/apply", "a billion laughs", "a hundred thousand brackets", "bytes"])
@pytest.mark.parametrize("command", ["cache", "report", "export", "probe", "data"])
def test_other_commands(here, refused, run, command, name):
    """Their own options from a file, and the run's configuration that they read."""
    spoilt = put(here / "c.yaml", YAMLS[name])
    if command == "cache":
        refused("cache", "--config", spoilt, "--out", here / "cache")
    elif command == "report":
        refused("report", "--config", spoilt)
    elif command == "data":
        refused("data", "verify", "--config", spoilt)
    else:
        put(run / "config.yaml", YAMLS[name])
        where = ["--ckpt", run, "--out", here / "out"] if command == "export" else ["--run", run]
        assert "config.yaml" in refused(command, *where)


def test_words_of_the_command_line_are_values_or_words():
    config, _ = stated(["--a", "!!python/name:os.system", "--b", "[" * 3000, "--c", "2020-13-45", "--d", "{x: 1}"])
    assert config == {"a": "!!python/name:os.system", "b": "[" * 3000, "c": "2020-13-45", "d": {"x": 1}}


def test_aliases_within_bounds_stay():
    assert parse("a: &a [1, 2]\nb: *a\nc: {<<: &m {x: 1}, y: *a}\nd: *m\n")[0] == {
        "a": [1, 2], "b": [1, 2], "c": {"x": 1, "y": [1, 2]}, "d": {"x": 1},
    }  # fmt: skip
    with pytest.raises(UserError, match=f"more than {MAX_VALUES} values"):
        parse(f"a: [{'1, ' * (MAX_VALUES + 1)}]")


def test_interpolations_within_bounds_stay():
    check_interpolations(
        {"a": "x" * 100, "b": ["${a}", "${.0}", "${oc.env:HOME}"], "c": {"d": "${b[0]}", "e": "${.d}"}}
    )


# ------------------------------------------------------------------------------------------------ anything at all

LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["os.system", "agglom.teachers.TinyTeacher", "${model.lr}", "1e-3", "-1", "../..", "pipe:touch marked", "s3://a/b"]
)  # fmt: skip
VALUE = st.recursive(
    LEAF,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["class_path", "init_args", "name", "steps", "x"]) | LEAF, inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value, keys=()):
    """The way to every value below a mapping or list."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*keys, key)
        yield from places(item, (*keys, key))


@pytest.fixture(scope="module")
def demo(scenes):
    from importlib.resources import files

    config = yaml.safe_load((files("agglom.configs") / "demo.yaml").read_text())
    config["data"]["data"] = str(scenes)
    config["stages"] = [{"steps": 5, "resolutions": [64]}, {"partitions": [{"teachers": ["clip"], "batch_size": 4}]}]
    return config


@pytest.mark.slow
@settings(
    max_examples=40, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_anywhere_is_fine_or_a_line(demo, here, data):
    config = yaml.safe_load(yaml.safe_dump(demo))
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(list(places(config))))
        inside = config
        for key in parents:
            inside = inside[key]
        how = data.draw(st.sampled_from(["set", "remove", "add"]))
        if how == "remove":
            del inside[last]
        elif how == "add" and isinstance(inside, dict):
            inside[data.draw(LEAF)] = data.draw(VALUE)
        else:
            inside[last] = data.draw(VALUE)
    try:
        text = yaml.safe_dump(config)
    except (yaml.YAMLError, TypeError):  # keys that can't be sorted
        return
    (here / "c.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert all(line.isprintable() for line in check_file(here / "c.yaml"))


@settings(
    max_examples=200, deadline=20_000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(alphabet="ab: -[]{}&*!<>|'\"#%@,?\n0.${}", max_size=60) | st.binary(max_size=40))
def test_any_text_is_a_configuration_or_a_line(here, text):
    put(here / "c.yaml", text)
    assert all(line.isprintable() for line in check_file(here / "c.yaml"))
