"""Soft prompts: virtual tokens, prefixes, and their places in the inputs."""
