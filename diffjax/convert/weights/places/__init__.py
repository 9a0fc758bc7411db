"""Where the parameters of networks lie in checkpoints, and whether they are there."""
