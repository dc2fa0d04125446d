"""The memory and the disk that a run needs, known before a weight is loaded; what to change if they do not suffice."""
