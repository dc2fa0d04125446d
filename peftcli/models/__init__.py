"""The transformers boundary: base models, tokenizers, model cards."""
