"""Code that the language tasks share: formats, chat templates and spans, encoding, prompts, generation."""
