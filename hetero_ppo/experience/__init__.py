"""From responses to advantages: the forwards of all roles over chunks of a rollout, while the generator works on the next ones.

Start at ``stages.py``, then ``pipeline.py`` for what runs at the same time.
"""
