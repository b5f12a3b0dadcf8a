"""All measuring programs of this project: `python -m benchmarks NAME`, see `--list`.

The driver runs *courses*, each in a process of its own, in the environment of one *side*: the
original pycloudlib or this package, or two versions of it. It keeps what they report, and writes
tables. What runs on the original too (`worker`, the courses `package`, `one`, `dead` and `many`,
and what they import) uses Python's own library and the interface that both packages share.
"""
