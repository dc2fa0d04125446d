"""What libraries that know PEFT call on the core's configs and layers. The core itself does without these methods."""
