"""Inspection: the rows of a recipe as the model sees them, and what is wrong with them."""
