"""Networks and functions that change what another network does, and leave it as it is."""
