"""Settings of a script: a dataclass's defaults, overlaid by config files, overlaid by `--key=value`.

    config, rest = configurator.load(Config, sys.argv[1:])

A word that ends in .py is a config file: plain assignments of what differs from the defaults, run as Python (so run only those you trust).
`--key=value` sets one field. Any other word comes back in `rest`: a run folder, say. Everything is checked by name and type against the dataclass,
the only home of names, types and defaults; its trailing comments are the text of `--help`.
"""
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
import traceback
import types

HERE = os.path.dirname(os.path.abspath(__file__))


class SettingError(Exception):
    """A user's mistake in a setting; its text is one line that says what, where and what to do."""


def load(cls, argv, usage=""):
    """An instance of the dataclass `cls` and the words of `argv` that are neither config files nor settings.

    Ends the program with exit code 0 after `--help`, and with code 2 and one line after a mistake.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, usage))
        sys.exit(0)
    try:
        values, rest = {}, []
        for word in argv:
            if word.endswith(".py") and not word.startswith("-"):
                values.update(from_file(cls, word))
            elif not word.startswith("-"):
                rest.append(word)
        for word in argv:  # after every file, wherever it stood: the command line has the last word
            if word.startswith("-"):
                values.update(from_word(cls, word))
        return cls(**values), rest
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def from_file(cls, path):
    """The settings that a config file assigns. Modules it imports and names that begin with an underscore are its own business."""
    found = path if os.path.exists(path) else os.path.join(HERE, path)
    if not os.path.isfile(found):
        near = difflib.get_close_matches(os.path.basename(path), os.listdir(os.path.join(HERE, "config")), n=1, cutoff=0.0)
        raise SettingError(f"no config file {path} (did you mean config/{near[0]}?)" if near else f"no config file {path}")
    try:
        names = runpy.run_path(found)
    except Exception as error:  # the file is the user's program: whatever is wrong in it is told in a line
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == found]
        line = (error.lineno if isinstance(error, SyntaxError) else inside[-1] if inside else 0) or 1  # 1: Python could not even read it
        raise SettingError(f"{path}, line {line}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    names = {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, types.ModuleType)}
    return {key: checked(cls, key, value, path) for key, value in names.items()}


def from_word(cls, word):
    """The setting that a word of the command line, `--key=value`, gives."""
    key, equals, text = word.removeprefix("--").partition("=")
    if not equals or not word.startswith("--"):
        raise SettingError(f"cannot read {word}: settings are written --key=value, with no space (see --help)")
    kind = field_type(cls, key, "the command line")
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise SettingError(f"--{key}={' '.join(text.split())[:60]}: {key} takes {describe(kind)}") from None
    return {key: checked(cls, key, value, "the command line")}


def field_type(cls, key, where):
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, n=1, cutoff=0.0)[0]
        raise SettingError(f"no setting {key!r} (from {where}); the nearest is {near!r}, and --help lists them all")
    return kinds[key]


def checked(cls, key, value, where):
    """`value` if it has the field's type; an int passes for a float."""
    kind = field_type(cls, key, where)
    if type(value) is int and value.bit_length() > 1000:  # more digits than Python likes to print, or a float can hold
        raise SettingError(f"{key} (from {where}) is a number of more than 300 digits")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise SettingError(f"{key} = {' '.join(repr(value).split())[:60]} (from {where}): {key} takes {describe(kind)}")
    return value


def describe(kind):
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[kind]


def help_text(cls, usage):
    """Each field as `--name=default  its trailing comment`, under the plain comment lines that head each group in the class."""
    lines = [usage.strip(), ""]
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): \w+ = .*?  # (.*)", line)
        if field:
            default = getattr(cls, field[1])
            lines.append(f"  --{field[1]}={default}".ljust(34) + f"  {field[2]}")
        elif line.startswith("    # "):
            lines.append(line[6:])
    return "\n".join(lines)
