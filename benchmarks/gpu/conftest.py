"""Keeps pytest out: these modules are a program for a machine with a GPU."""

collect_ignore_glob = ["*.py"]
