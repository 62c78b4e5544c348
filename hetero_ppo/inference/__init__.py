"""The decoder: responses from a role's own Megatron model, and beam search over any generator.

Start at ``decoder.py``.
"""
