"""What one does with a finished adapter: load, generate, merge, combine, compare, describe, push."""
