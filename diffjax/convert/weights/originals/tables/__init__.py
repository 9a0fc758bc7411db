"""Whose names are whose: a table for each network that its authors named otherwise, and its config from shapes."""
