"""What a person sees of a run while it trains and when it ends."""
