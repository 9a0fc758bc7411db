"""Evidence about a bad step never decides how the run goes on."""

import pytest

from diffjax.train.survival.evidence import again
from diffjax.train.survival.history import Batches


class Source:
    """Batches 0, 1, ...; batch 3 can be read once."""

    def __init__(self):
        self.position, self.reads = 0, 0

    def __next__(self):
        self.reads += self.position == 3
        if self.position == 3 and self.reads > 1:
            raise OSError("gone")
        self.position += 1
        return self.position - 1

    def get_state(self):
        return {"next_index": self.position}

    def set_state(self, state):
        self.position = state["next_index"]


def test_reading_a_batch_again_leaves_the_iterator_where_it_was():
    batches = Batches(Source())
    batches.skip(1, 2)
    assert [next(batches) for _ in range(4)] == [0, 2, 3, 4]
    batches.note(0.5)
    before = batches.get_state()
    # A batch that was left out can be read again, too.
    assert again(batches, 2) == 2 and again(batches, 1) == 1 and batches.get_state() == before
    with pytest.raises(OSError, match="gone"):
        again(batches, 3)
    assert batches.get_state() == before and next(batches) == 5
