"""Weights between Hugging Face names and Megatron-Core's shards: import, export, streaming, and digests.

Start at ``import_hf.py``; ``weight_plan.py`` lists the tensors of a model.
"""
