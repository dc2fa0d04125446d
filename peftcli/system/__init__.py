"""Operating-system matters: files, signals, the hub's HTTP requests, output files, secrets. No torch here."""
