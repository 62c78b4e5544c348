"""vLLM's HTTP servers: their command lines, processes, supervision and clients, on one node or several.

Start at ``server.py``, then ``pool.py`` for several of them.
"""
