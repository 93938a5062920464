"""What keeps the programs running: settings, files, corpora, checkpoints, runs, figures.

A student never has to open it.
"""
import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("error: Python 3.10 or newer is needed, by torch too; this is " + sys.version.split()[0])
