"""U-Nets that denoise: one file for each class of checkpoints."""
