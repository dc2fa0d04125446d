"""The devices of a run: its processes, on one machine or several, and what each holds of the model."""
