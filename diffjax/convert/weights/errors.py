"""What goes wrong with files of weights."""


class WeightsError(ValueError):
    """A file of weights that cannot be read, or does not hold the parameters of its network."""
