"""The transformers boundary: base models, processors, model cards."""
