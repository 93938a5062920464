"""plumbing/settings.py: what a setting may be, who has the last word, and the line that a mistake gets."""
import math
import os
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest
from conftest import ROOT, run_many

from config import defaults
from plumbing import settings
from plumbing.files import write_atomic
from plumbing.settings import Count, Positive, Share, Whole

@dataclass
class Config:
    # First
    name: str = "plain"  # of the thing
    steps: int = 10  # how many
    # Second
    rate: float = 0.5  # how fast; any number # above zero
    loud: bool = False  # whether to print more
    kind: Literal["red", "blue"] = "red"  # its colour
    n: Count = 1  # how many at least
    start: Whole = 0  # where
    share: Share = 0.5  # of all
    lr: Positive = 0.1  # how fast
    source: list[str] = field(default_factory=list)  # where from

@pytest.fixture
def write(tmp_path):
    """A function that writes a config file and returns its path."""

    def write(text, name="settings.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write

def load(*words, rules=()):
    return settings.load(Config, "", rules, list(words))

def mistake(capsys, *words):
    """The one line that these words end with."""
    with pytest.raises(SystemExit) as ended:
        load(*words)
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", output.err) and output.out == ""
    return output.err

def test_defaults():
    assert load() == (Config("plain", 10, 0.5, False, "red", 1, 0, 0.5, 0.1, []), [])

def test_command_line():
    config, rest = load("--name=a=b c", "--steps=-3", "--rate=1e-4", "--loud=True")
    assert config == Config("a=b c", -3, 1e-4, True) and rest == []

def test_config_file(write):
    config, rest = load(write("import math\nname = 'from file'\n_half = math.pi / 2\nlr = _half\nrate = 3"))
    assert config == Config("from file", 10, 3.0, lr=math.pi / 2) and rest == []
    assert type(config.rate) is float

def test_the_later_file_and_always_the_command_line_win(write):
    first = write("name = 'first'\nsteps = 1\nrate = 1.0", "first.py")
    second = write("name = 'second'\nsteps = 2", "second.py")
    assert load(first, second)[0] == Config("second", 2, 1.0)
    assert load(second, first)[0] == Config("first", 1, 1.0)
    assert load("--steps=3", first, second)[0] == Config("second", 3, 1.0)
    assert load(first, "--steps=3", "--steps=4", second)[0] == Config("second", 4, 1.0)

def test_other_words_come_back(write):
    config, rest = load("out/run", write("steps = 5"), "--name=x", "two words")
    assert config == Config("x", 5) and rest == ["out/run", "two words"]

def test_files_are_found_from_any_folder(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("steps = 7", "near.py")
    assert load("near.py")[0].steps == 7  # beside the user
    assert "(from config/train_65m.py)" in mistake(capsys, "config/train_65m.py")  # beside the code

def test_a_list_grows_word_by_word(write):
    assert load("--source=a", "--source=b=c")[0].source == ["a", "b=c"]
    assert load(write("source = ['x', 'y']"))[0].source == ["x", "y"]

def test_a_tilde_is_the_home_folder_wherever_a_path_begins(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config, rest = load("--name=~/x", "--source=da=~/a,~/b~", "--source=~", "~/run")
    assert config == Config("/home/me/x", source=["da=/home/me/a,/home/me/b~", "/home/me"])
    assert rest == ["/home/me/run"] and load(write("name = '~/y'"))[0].name == "/home/me/y"

def test_rules_show_the_settings_that_they_name(capsys):
    with pytest.raises(SystemExit):
        load("--n=3", rules=[(lambda c: c.n < c.steps, "n must be below steps"),
                             (lambda c: c.n > 5, "n must be above 5, said rate")])
    assert capsys.readouterr().err == "error: n = 3, rate = 0.5: n must be above 5, said rate\n"

@pytest.mark.parametrize(("word", "said"), [
    ("--stepz=3", ["'stepz'", "'steps'", "command line", "--help"]),
    ("--Rate=3", ["'Rate'", "'rate'"]),
    ("--steps=3.0", ["--steps=3.0", "a whole number"]),
    ("--steps=", ["--steps=", "a whole number"]),
    ("--rate=fast", ["--rate=fast", "a number"]),
    ("--loud=1", ["--loud=1", "True or False"]),
    ("--loud", ["--loud", "--key=value"]),
    ("--kind=green", ["kind = 'green'", "one of red, blue"]),
    ("--n=0", ["n = 0", "1 or more"]),
    ("--start=-1", ["start = -1", "0 or more"]),
    ("--share=nan", ["share = nan", "from 0 to 1"]),
    ("--lr=inf", ["lr = inf", "above 0"]),
    (f"--n={10**30}", ["n = 1000", "1 or more"]),
])
def test_mistakes_on_the_command_line(capsys, word, said):
    line = mistake(capsys, word)
    assert all(part in line for part in said), line

@pytest.mark.parametrize(("text", "said"), [
    ("stepz = 3", ["'stepz'", "'steps'"]),
    ("steps = True", ["steps = True", "a whole number"]),
    ("rate = True", ["rate = True", "a number"]),
    ("name = None", ["name = None", "text"]),
    ("steps = 1\nrate = = 2", ["line 2", "SyntaxError"]),
    ("import json\nsteps = 1\nname = json.loads('{')", ["line 3", "JSONDecodeError"]),
    ("def _f():\n    raise ValueError('one\\ntwo')\n\n_f()", ["ValueError", "line"]),
])
def test_mistakes_in_a_file(capsys, write, text, said):
    path = write(text)
    line = mistake(capsys, path)
    assert path in line and all(part in line for part in said), line

def test_a_file_that_is_not_there(capsys):
    line = mistake(capsys, "config/train_11.py")
    assert "config/train_11.py" in line and "config/train_11m.py" in line

def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        settings.load(Config, "Does things.\n\n    python thing.py", argv=["--stepz=3", "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == ["Does things.", "", "    python thing.py", ""]
    assert [" ".join(line.split()) for line in lines[4:11]] == [
        "First", "--name=plain of the thing", "--steps=10 how many", "Second",
        "--rate=0.5 how fast; any number # above zero", "--loud=False whether to print more",
        "--kind=red its colour (red, blue)"]

@pytest.mark.parametrize("script", [path for path in [*sorted(ROOT.glob("*.py")), ROOT / "data/prepare.py"]
                                    if path.name == "train.py" or "class Config" in path.read_text()],
                         ids=lambda path: path.name)
def test_help_of_every_script(script, tmp_path):
    """Every field of its Config is shown with its default and its comment; from any folder."""
    (done,) = run_many(script, [["--help"]], cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    source = (ROOT / "config/defaults.py" if script.name == "train.py" else script).read_text()
    body = source.split("class Config:\n")[1].split("\n\n")[0]
    fields = re.findall(r"^    (\w+): [^=\n]+ = .+?  # (.+)$", body, re.MULTILINE)
    assert len(fields) == len(re.findall(r"^    \w+: ", body, re.MULTILINE))
    for key, comment in fields:
        assert re.search(rf"^  --{key}=.* {re.escape(comment)}", done.stdout, re.MULTILINE), key

def test_config_files_set_what_there_is():
    for path in sorted((ROOT / "config").glob("train_*.py")):
        config, _ = settings.load(defaults.Config, "", defaults.RULES, [str(path)])
        assert config.n_layers == 12 and path.stem.removeprefix("train_") in config.out_dir

@pytest.mark.parametrize("words", [["--mix=joint"], ["--mix=inline", "--meta_ratio=1", "--readout=last"],
                                   ["--mix=inline", "--meta_ratio=1", "--micro_batch_size=2"]])
def test_a_mix_that_could_not_be_is_told(words, capsys):
    with pytest.raises(SystemExit):
        settings.load(defaults.Config, "", defaults.RULES, words)
    assert capsys.readouterr().err.startswith("error: mix = ")
    settings.load(defaults.Config, "", defaults.RULES, [*words[:1], "--meta_ratio=1"])

def test_what_is_no_file_is_not_renamed_over(tmp_path):
    """As root a figure "written" to /dev/null would replace it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SystemExit):
        write_atomic(tmp_path / "pipe", "text")
    assert not os.path.isfile(tmp_path / "pipe")
