"""What the language tasks share: chat templates and spans, formats, packing, collation, stop tokens."""
