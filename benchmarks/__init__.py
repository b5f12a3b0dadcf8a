"""The benchmark: the same programs on the original pycloudlib and on this package, in turn.

What runs in both (`courses`, and what they import) uses Python's own library and the interface that
both packages share, nothing else.
"""
