"""Soft prompts: virtual tokens, prefixes, and where they stand in the inputs."""
