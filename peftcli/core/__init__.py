"""Adapter injection: torch and safetensors only."""
