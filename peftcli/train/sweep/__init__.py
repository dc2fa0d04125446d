"""Try several settings of one recipe over one copy of its base model, and end only the best runs.

space     ``KEY=A,B,C`` and ``KEY=1e-5..1e-2`` -> the settings to try
proposals what to try next where there are too many: optuna
record    sweep.json
halving   which runs go on
runs      the runs themselves, a step each in turn
picture   sweep.png
start     a whole sweep
"""
