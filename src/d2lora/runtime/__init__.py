"""What a run needs of the machine: its folder, messages, tables of text, heavy imports.

Imports nothing of the rooms above; every room may use it.
"""
