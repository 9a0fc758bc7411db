"""Where arrays live and how devices work together."""
