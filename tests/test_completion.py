"""Shell completion: the function for bash, run by bash, knows commands, options and choices."""

import shutil
import subprocess

import pytest

from agglom.cli import COMMANDS, DATA, main
from agglom.completion import SHELLS, script, tree


@pytest.fixture(scope="module")
def scripts():
    return {shell: script(shell) for shell in SHELLS}


def complete(text, *words):
    """What bash offers after these words."""
    line = " ".join(f"'{word}'" for word in words)
    driver = f"""{text}
COMP_WORDS=(agglom {line}); COMP_CWORD={len(words)}
name=$(complete -p agglom | sed 's/.*-F \\([^ ]*\\).*/\\1/')
$name agglom '{words[-1]}' '{(["agglom"] + list(words))[-2]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "--norc"], input=driver, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow
def test_bash_completes(scripts):
    bash = scripts["bash"]
    assert set(complete(bash, "")) >= set(COMMANDS)
    assert complete(bash, "pro") == ["probe"]
    assert complete(bash, "data", "ve") == ["verify"] and set(complete(bash, "data", "")) >= set(DATA)
    assert set(complete(bash, "cache", "--dtype", "")) == {"bf16", "fp16", "fp32", "int8"}
    assert complete(bash, "probe", "--templ") == ["--templates"]
    wanted = {"--checkpoint_every", "--checkpoint_keep", "--checkpoint_minutes"}
    assert set(complete(bash, "fit", "--checkpoint_")) == wanted
    assert "--model.layer_decay" in complete(bash, "fit", "--model.la")
    assert complete(bash, "export", "--out", "x", "--adap") == ["--adaptors"]


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_accept_theirs(scripts, shell, tmp_path):
    assert all(name in scripts[shell] for name in (*COMMANDS, "checkpoint_minutes"))
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here to read it")
    (tmp_path / "script").write_text(scripts[shell])
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_every_option_is_there(capsys):
    """The tree has the options that each command's own help names."""
    branches = next(action.choices for action in tree()._actions if isinstance(action.choices, dict))
    assert set(branches) == set(COMMANDS)
    for name in ("info", "probe", "embed", "export"):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        helped = capsys.readouterr().out
        options = [option for action in branches[name]._actions for option in action.option_strings]
        for option in options:
            assert option in helped, option
        assert len(options) > 3


def test_an_unknown_shell_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--print_completion", "tcsh"])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and "'tcsh' is no shell" in err and "bash" in err
