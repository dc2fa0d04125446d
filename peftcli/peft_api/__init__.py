"""PEFT's names over the core, so that code written for PEFT runs with its import changed."""
