"""Layers, attention, packing and heads of the models, and the configuration that Megatron-Core builds them from.

Start at ``layers.py``; ``config_mapping.py`` builds the configuration.
"""
