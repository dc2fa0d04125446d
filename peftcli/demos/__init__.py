"""A small example of each task, which ``peftcli demo`` runs on a laptop."""
