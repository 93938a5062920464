"""What keeps the programs running: settings, files, corpora, checkpoints, runs, figures.

A student never has to open it.
"""
