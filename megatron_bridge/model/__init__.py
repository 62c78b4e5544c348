"""Layers, attention, packing and heads of the models, and the configuration that Megatron-Core builds them from.

Start at ``model_provider.py``, then ``layers.py``.
"""
