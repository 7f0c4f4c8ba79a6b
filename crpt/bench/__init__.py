"""Figures with their machine, versions and command: `python -m crpt.bench NAME`.

A claim of speed is a ratio from one run: every bench times ours and theirs in turns, in one
process, and prints both.
"""
