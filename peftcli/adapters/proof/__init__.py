"""Proof of what an adapter is: that its folder is the trained model, what it gained, what was forgotten, and why."""
