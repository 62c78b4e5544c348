"""Weights between Hugging Face names and Megatron-Core's shards: import, export, streaming, and their digests.

Start at ``import_hf.py``.
"""
