"""Log-probabilities of rows under a model: completions, pairs, multiple choice.

Above fast; training and evaluation share it.
"""
