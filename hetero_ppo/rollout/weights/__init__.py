"""Brings new weights to the servers, with checksums: by files in shared memory, by CUDA IPC, or by a process group.

Start at ``weight_sync.py``, which lists the parts of a sync. ``worker_extension.py`` and ``loaded_weights.py`` run inside vLLM's workers.
"""
