"""The lake: Delta tables of what was asked, answered, learnt and decided.

One process writes it (`writer`), exactly once whatever dies when; `query` reads it.
"""
