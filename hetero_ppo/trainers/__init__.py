"""SFT, reward model and PPO: ``fit`` of each reads as its algorithm.

Start at ``ppo.py``; ``run.py`` opens and closes what every kind of run needs.
"""
