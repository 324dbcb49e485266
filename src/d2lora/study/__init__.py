"""Comparison of initializations over tasks, sizes and seeds: plans, cells, jobs, finished runs.

Above the method and the tools; knows nothing of the report.
"""
