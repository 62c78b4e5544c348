"""Weights between Hugging Face names and Megatron-Core's shards: import, export, streaming, and their digests.

Start at ``param_mapping.py``.
"""
