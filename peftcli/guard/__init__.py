"""Untrusted input: files, JSON, safetensors headers, patterns. No torch here."""
