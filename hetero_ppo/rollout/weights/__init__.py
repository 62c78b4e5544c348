"""New weights for the servers: by files in shared memory, by CUDA IPC, or by a process group, each with checksums.

Start at ``weight_sync.py``. ``worker_extension.py`` and ``loaded_weights.py`` run inside of vLLM's workers.
"""
