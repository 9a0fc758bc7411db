"""Networks in folders, as diffusers and transformers have them."""
