"""Safe reading of untrusted input: files, JSON, safetensors headers, patterns. No torch here."""
