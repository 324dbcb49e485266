"""Which rows to warm up on: cleaning a pool, features of its rows, methods, the data card.

Above training (gradients and losses of rows); `select` is the command.
"""
