"""Other packages' codecs of keys and values, measured as our schemes are.

One file for each family of peers; `roster.py` names them, `python -m benchmarks.peers` measures.
"""
