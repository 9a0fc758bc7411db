"""Folders of weights on the command line: looked at, and written again."""
