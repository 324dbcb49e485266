"""From files to token ids: sources, rows, tasks, chat formats, batches, contamination.

Above adapters (the base's tokenizer); knows nothing of training or scores.
"""
