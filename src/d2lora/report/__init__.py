"""The report of a study: findings, statistics of its cells, the page, charts, tables.

Above study, whose files it reads; only the commands are above it.
"""
