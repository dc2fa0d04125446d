"""Drafting a recipe: from a user's data (``peftcli init``), or from another tool's recipe (``peftcli import``)."""
