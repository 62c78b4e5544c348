"""The mathematics of PPO as pure functions of tensors: KL, rewards, advantages, losses.

Start at ``advantages.py``. Nothing here knows of models, processes or configurations of runs.
"""
