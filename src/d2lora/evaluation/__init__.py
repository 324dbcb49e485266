"""What an adapter does on test rows: decoding, metrics, forgetting, statistics.

Above scoring; `evaluate` is the command.
"""
