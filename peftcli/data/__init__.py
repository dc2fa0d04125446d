"""Rows of a dataset -> examples -> token ids and labels -> padded batches."""
