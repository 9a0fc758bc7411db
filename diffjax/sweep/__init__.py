"""Many runs of one config: a grid of settings and seeds, run one after another or on a cluster, compared in a table.

`run.sweep` is the whole of it. Nothing is imported here: a job on a cluster needs `launch` alone, and starts sooner.
"""
