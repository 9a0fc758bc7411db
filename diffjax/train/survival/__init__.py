"""What keeps a run alive or ends it well: bad steps, failed saves, signals."""
