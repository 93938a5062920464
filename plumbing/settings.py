"""Settings of a script: a dataclass's defaults, overlaid by config files, overlaid by `--key=value`.

    config, words = settings.load(Config, __doc__, RULES)

A word that ends in .py is a config file: plain assignments of what differs from the defaults. It is run as
Python, so run only those you trust. `--key=value` sets one field. Other words come back: a run folder, say.
The dataclass is the only home of names, types, choices, ranges and defaults; its trailing comments are the
text of `--help`. RULES is for what two settings say of each other: pairs of a condition and its sentence.
"""
import difflib
import inspect
import math
import os
import re
import runpy
import sys
import traceback
import types
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

from plumbing.files import ROOT, fail, reason

LARGEST = 2**63 - 1  # what an int64 tensor holds
Whole = Annotated[int, lambda n: 0 <= n <= LARGEST, "a whole number, 0 or more"]
Count = Annotated[int, lambda n: 1 <= n <= LARGEST, "a whole number, 1 or more"]
Share = Annotated[float, lambda x: 0 <= x <= 1, "a number from 0 to 1"]
Positive = Annotated[float, lambda x: 0 < x < math.inf, "a number above 0"]
Prompt = Annotated[str, lambda text: True, "text as it is"]  # any other str may be a path: its ~ is home
PLAIN = {bool: "True or False", int: "a whole number", float: "a number", str: "text", list: "text"}

def load(cls, usage, rules=(), argv=None, allow_words=True):
    """An instance of the dataclass `cls`, and the words that are neither files nor settings."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, usage))
        sys.exit(0)
    values, words = {}, []
    for word in sorted(argv, key=lambda word: word.startswith("-")):  # files first
        if word.startswith("-"):
            key, setting = read_word(cls, word)
            if isinstance(setting, list):  # given again, a list grows
                setting = values.get(key, []) + setting
            values[key] = setting
        elif word.endswith(".py"):
            values |= read_config_file(cls, word)
        elif allow_words:
            words.append(os.path.expanduser(word))
        else:
            fail(f"cannot read {word}: a config file ends in .py, a setting is --key=value (see --help)")
    config = cls(**values)
    for holds, sentence in rules:
        if not holds(config):
            named = [key for key in dict.fromkeys(re.findall(r"\w+", sentence)) if hasattr(config, key)]
            fail(f"{', '.join(f'{key} = {getattr(config, key)}' for key in named)}: {sentence}")
    return config, words

def read_config_file(cls, path):
    """The settings that a config file assigns: all its names but modules and those that begin with _."""
    file = path if os.path.exists(path) else os.path.join(ROOT, path)
    if not os.path.isfile(file):
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(ROOT / "config"), n=1, cutoff=0.0)
        fail(f"no config file {path} (did you mean config/{near[0]}?)")
    try:
        names = runpy.run_path(file)
    except Exception as error:  # the file is the user's own program: anything can be wrong in it
        frames = traceback.extract_tb(error.__traceback__)
        lines = [getattr(error, "lineno", 1), *(frame.lineno for frame in frames if frame.filename == file)]
        fail(f"{path}, line {lines[-1]}: {type(error).__name__}: {reason(error)}")
    own = {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    return {key: checked(cls, key, setting, path) for key, setting in own.items()}

def read_word(cls, word):
    """(key, setting) of a word of the command line, --key=value."""
    key, equals, text = word.removeprefix("--").partition("=")
    if not equals or not word.startswith("--"):
        fail(f"cannot read {word}: settings are written --key=value, with no space (see --help)")
    plain, _, what = kind_of(cls, key, "the command line")
    convert = {bool: lambda text: {"true": True, "false": False}[text.lower()], list: lambda text: [text]}
    try:
        setting = convert.get(plain, plain)(text)
    except (KeyError, ValueError):
        fail(f"--{key}={text[:60]}: {key} takes {what}")
    return key, checked(cls, key, setting, "the command line")

def kind_of(cls, key, where):
    """(type, test of a setting, what it takes in words) of the field `key`, from its annotation."""
    kinds = get_type_hints(cls, include_extras=True)
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
        fail(f"no setting {key!r} (from {where}); the nearest is {near!r}, and --help lists them all")
    kind, arguments = kinds[key], get_args(kinds[key])
    if get_origin(kind) is Annotated:
        return arguments
    if get_origin(kind) is Literal:
        choices = ", ".join(map(str, arguments))
        return type(arguments[0]), lambda setting: setting in arguments, f"one of {choices}"
    plain = get_origin(kind) or kind
    return plain, lambda setting: True, PLAIN[plain]

def checked(cls, key, setting, where):
    """`setting` if it has the field's type and range; an int passes for a float."""
    plain, holds, what = kind_of(cls, key, where)
    if plain is float and type(setting) is int and abs(setting) < LARGEST:
        setting = float(setting)
    if type(setting) is not plain or not holds(setting):
        fail(f"{key} = {repr(setting)[:60]} (from {where}): {key} takes {what}")
    if what == "text":  # not a Prompt, nor one of some choices
        return [home(text) for text in setting] if plain is list else home(setting)
    return setting

def home(text):
    """Paths with ~ as a shell would have them, also in NAME=~/a,~/b; no shell does it behind a =."""
    return "".join(map(os.path.expanduser, re.split("([=,])", text)))

def help_text(cls, usage):
    """Each field as `--key=default  its comment`, under the comment lines that head the class's groups."""
    lines = [(usage or "").strip(), ""]
    for line in inspect.getsource(cls).splitlines():
        if field := re.match(r"    (\w+): .+? = .*?  # (.*)", line):
            key, comment = field.groups()
            kind = get_type_hints(cls, include_extras=True)[key]
            choices = f" ({', '.join(map(str, get_args(kind)))})" if get_origin(kind) is Literal else ""
            lines.append(f"  --{key}={getattr(cls, key, '')}".ljust(34) + f"  {comment}{choices}")
        elif line.startswith("    # "):
            lines.append(line[6:])
    return "\n".join(lines)
