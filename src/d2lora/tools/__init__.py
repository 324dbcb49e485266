"""Commands around the two phases: convert, inspect, preference pairs.

Above the method; nothing but study and the commands imports them.
"""
