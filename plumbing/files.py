"""How a program ends with one line, how a file is written whole or not at all, how a folder is locked.

Scripts import this before torch, so that Ctrl-C is quiet from then on.
"""
import atexit
import contextlib
import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import filelock
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]  # the repository

def fail(message, code=2):
    """End the program with one line. Code 2: a mistake before anything starts; 1: one that came later."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)  # names of files hold anything
    tqdm.write(f"error: {line}", file=sys.stderr)  # below a progress bar, if one is shown
    sys.exit(code)

def reason(error):
    """An exception as one line."""
    if isinstance(error, KeyError):
        return f"it lacks {error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__

@contextlib.contextmanager
def attempt(what, remedy):
    """Run the block; if it fails, end with "cannot WHAT: reason; REMEDY". For what others wrote or run."""
    try:
        yield
    except Exception as error:  # each library has exceptions of its own for a damaged file
        fail(f"cannot {what}: {reason(error)}; {remedy}")

def report(kind, error, trace):
    """sys.excepthook: one line for what a user can mend (memory, disk, Ctrl-C), else a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nstopped", file=sys.stderr)
    elif issubclass(kind, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error):
        print("error: out of memory: lower micro_batch_size, micro_episodes or block_size", file=sys.stderr)
    elif issubclass(kind, BrokenPipeError):
        pass  # there is nobody to tell
    elif issubclass(kind, OSError) or kind.__name__ == "SafetensorError":  # a full disk raises either
        path = getattr(error, "filename", None) or "a file"
        print(f"error: {path}: {reason(error)}; what was saved before is untouched", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)

sys.excepthook = report
with contextlib.suppress(AttributeError, OSError):  # a notebook's stdout cannot be reconfigured
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a ? for it

@atexit.register
def flush_output():
    """Flush stdout. If its reader is gone (`| head`), drop the rest, where Python would complain."""
    try:
        print(end="", flush=True)  # where stdout is closed there is none
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

def on_signals(handler):
    """Call handler(number, frame) at Ctrl-C, kill or a closed terminal, unless it is ignored (nohup)."""
    for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):  # Windows: none
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)

# --------------------------------------------------------------------------------------------------
# Files

def write_atomic(path, content):
    """Write bytes, a text, or what content(file) writes. `path` is the old file or the new, never half."""
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"cannot write {path}: it is not a regular file")  # /dev/null would become one
    beside = f"{path}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    try:
        with open(beside, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)

def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()

def read_json(path, remedy="make it or copy it again"):
    """The object in a JSON file; a damaged file ends the program."""
    with attempt(f"read {path}", remedy):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content

locks = []  # held until this process ends, in whatever way: kill -9 frees them too

def lock(folder):
    """Keep other processes that lock this folder out of it."""
    locks.append(filelock.FileLock(f"{folder}/.lock"))
    try:
        locks[-1].acquire(timeout=0)
    except filelock.Timeout:
        fail(f"another process is at work on {folder}: wait until it has ended, or take another folder")
