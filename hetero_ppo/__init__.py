"""RLHF on Megatron-Core: SFT, reward models and PPO, with vLLM as HTTP servers.

Start at ``trainers/ppo.py``: its ``fit`` reads as the algorithm. ``step/`` defines the phases that it goes through.
"""
