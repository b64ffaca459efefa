"""Bugs with batch normalization that no error shows, found in anybody's model.

Each check is a file of `checks/`: its code, what it is about, where that comes from, how it is found and mended, and
the bug itself, planted for the tests. A `Subject` is what all of them look at; `examine` runs them.
"""
