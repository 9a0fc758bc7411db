"""Files of adapters: LoRA, IP-Adapter, textual inversion."""
