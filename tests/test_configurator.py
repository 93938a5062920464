"""configurator.py, rule by rule: what a setting may be, who has the last word, and the one line that a mistake ends with."""
import re
from dataclasses import dataclass

import pytest
from conftest import ROOT, run_script

import configurator


@dataclass
class Config:
    # First
    name: str = "plain"  # of the thing
    steps: int = 10  # how many
    # Second
    rate: float = 0.5  # how fast; any number # above zero
    loud: bool = False  # whether to say so


@pytest.fixture
def write(tmp_path):
    """A function that writes a config file and returns its path."""

    def write(text, name="settings.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def load(*words):
    return configurator.load(Config, list(words))


def mistake(capsys, *words):
    """The one line that these words end with."""
    with pytest.raises(SystemExit) as ended:
        load(*words)
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", output.err) and output.out == ""
    return output.err


def test_defaults():
    assert load() == (Config("plain", 10, 0.5, False), [])


def test_command_line():
    config, rest = load("--name=a=b c", "--steps=-3", "--rate=1e-4", "--loud=True")
    assert config == Config("a=b c", -3, 1e-4, True) and rest == []


@pytest.mark.parametrize(("text", "value"), [("True", True), ("true", True), ("False", False), ("false", False)])
def test_booleans(text, value):
    assert load("--loud=" + ("False" if value else "True"), f"--loud={text}")[0].loud is value


def test_an_int_passes_for_a_float(write):
    for config, _ in (load("--rate=3"), load(write("rate = 3"))):
        assert config.rate == 3.0 and type(config.rate) is float


def test_config_file(write):
    config, rest = load(write("import math\nname = 'from file'\n_half = math.pi / 2\nrate = _half"))
    assert config == Config("from file", 10, pytest.approx(1.5707963), False) and rest == []


def test_the_later_file_and_always_the_command_line_win(write):
    first, second = write("name = 'first'\nsteps = 1\nrate = 1.0", "first.py"), write("name = 'second'\nsteps = 2", "second.py")
    assert load(first, second)[0] == Config("second", 2, 1.0)
    assert load(second, first)[0] == Config("first", 1, 1.0)
    assert load("--steps=3", first, second)[0] == Config("second", 3, 1.0)
    assert load(first, "--steps=3", "--steps=4", second)[0] == Config("second", 4, 1.0)


def test_other_words_come_back(write):
    config, rest = load("out/run", write("steps = 5"), "--name=x", "two words")
    assert config == Config("x", 5) and rest == ["out/run", "two words"]


def test_files_are_found_from_any_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("steps = 7", "near.py")
    assert load("near.py")[0].steps == 7  # beside the user
    assert "from config/train_11m.py" in mistake_of_train(tmp_path)  # beside the code


def mistake_of_train(folder):
    """The mistake in the repository's own file is that this dataclass has no d_model, so the file was found and read."""
    with pytest.raises(configurator.SettingError) as error:
        configurator.from_file(Config, "config/train_11m.py")
    return str(error.value)


@pytest.mark.parametrize(("word", "said"), [
    ("--stepz=3", ["'stepz'", "'steps'", "command line", "--help"]),
    ("--Rate=3", ["'Rate'", "'rate'"]),
    ("--steps=3.0", ["--steps=3.0", "a whole number"]),
    ("--steps=many", ["--steps=many", "a whole number"]),
    ("--steps=", ["--steps=", "a whole number"]),
    ("--rate=fast", ["--rate=fast", "a number"]),
    ("--loud=yes", ["--loud=yes", "True or False"]),
    ("--loud=1", ["--loud=1", "True or False"]),
    ("--loud", ["--loud", "--key=value"]),
    ("-loud=True", ["-loud=True", "--key=value"]),
])  # fmt: skip
def test_mistakes_on_the_command_line(capsys, word, said):
    line = mistake(capsys, word)
    assert all(part in line for part in said), line


@pytest.mark.parametrize(("text", "said"), [
    ("stepz = 3", ["'stepz'", "'steps'"]),
    ("steps = 3.0", ["steps = 3.0", "a whole number"]),
    ("steps = True", ["steps = True", "a whole number"]),
    ("steps = '3'", ["steps = '3'", "a whole number"]),
    ("rate = True", ["rate = True", "a number"]),
    ("loud = 1", ["loud = 1", "True or False"]),
    ("name = None", ["name = None", "text"]),
    ("steps = 1\nrate = = 2", ["line 2", "SyntaxError"]),
    ("steps = 1\n\nrate = undefined", ["line 3", "NameError", "undefined"]),
    ("import json\nsteps = 1\nname = json.loads('{')", ["line 3", "JSONDecodeError"]),
    ("def _f():\n    raise ValueError('one\\ntwo')\n\n_f()", ["ValueError", "line"]),
    ("import nowhere_to_be_found", ["line 1", "ModuleNotFoundError"]),
])  # fmt: skip
def test_mistakes_in_a_file(capsys, write, text, said):
    path = write(text)
    line = mistake(capsys, path)
    assert path in line and all(part in line for part in said), line


def test_a_file_that_is_not_there(capsys):
    line = mistake(capsys, "config/train_11.py")
    assert "no config file config/train_11.py" in line and "config/train_11m.py" in line


def test_mistakes_in_a_file_stop_even_what_the_command_line_overrules(capsys, write):
    assert "'stepz'" in mistake(capsys, write("stepz = 3"), "--steps=3")


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        configurator.load(Config, ["--stepz=3", "--help"], usage="Does things.\n\n    python thing.py")
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["Does things.", "", "    python thing.py", ""]
    assert [line.split() for line in lines[4:]] == [
        ["First"],
        ["--name=plain", "of", "the", "thing"],
        ["--steps=10", "how", "many"],
        ["Second"],
        *[line.split() for line in ("--rate=0.5  how fast; any number # above zero", "--loud=False  whether to say so")],
    ]


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_of_the_scripts_shows_every_setting_with_default_and_comment(script, tmp_path):
    shown = run_script(ROOT / script, "--help", cwd=tmp_path).stdout
    source = (ROOT / script).read_text().split("class Config:\n")[1].split("\n\n\n")[0]
    fields = re.findall(r"^    (\w+): (\w+) = (.+?)  # (.+)$", source, re.MULTILINE)
    assert len(fields) == len(re.findall(r"^    \w+: ", source, re.MULTILINE)) >= 7  # every field has a comment
    for name, kind, default, comment in fields:
        default = {"int": default.replace("_", ""), "float": str(float(default)) if kind == "float" else ""}.get(kind, default.strip('"'))
        default = "[^ ]+" if "os.path" in default else re.escape(default)
        assert re.search(rf"^  --{name}={default} +{re.escape(comment)}$", shown, re.MULTILINE), name


def test_every_config_file_sets_what_there_is():
    """Read by text, not run: files may look for a GPU."""
    names = set(re.findall(r"^    (\w+): \w+ = ", (ROOT / "train.py").read_text().split("class Config:\n")[1].split("\n\n\n")[0], re.MULTILINE))
    for path in (ROOT / "config").glob("train_*.py"):
        assigned = {name.strip() for line in re.findall(r"^ *([a-z]\w*(?:, \w+)*) = ", path.read_text(), re.MULTILINE) for name in line.split(",")}
        assert assigned and assigned <= names, (path.name, assigned - names)
