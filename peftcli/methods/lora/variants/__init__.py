"""LoRA's variants, one file for each; the settings of all are in config.py. No torch here."""
