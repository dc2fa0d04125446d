"""Untrusted input: files, JSON, safetensors headers, patterns, chat templates. No torch here."""
