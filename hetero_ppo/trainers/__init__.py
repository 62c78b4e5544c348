"""SFT, reward model and PPO: ``fit`` of each reads as its algorithm.

Start at ``ppo.py``. ``open_ppo.py`` opens and closes the parts of a PPO run, ``run.py`` what every kind of run needs.
"""
