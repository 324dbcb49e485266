"""One loop for both phases: rows of a phase, objectives, initializations, checkpoints, cost.

Above evaluation and scoring; `phase.run_phase` is what warm-up and adaptation share.
"""
