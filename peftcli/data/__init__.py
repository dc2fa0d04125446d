"""Rows of a dataset -> examples in a store. Knows no task."""
