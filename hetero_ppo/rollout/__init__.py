"""What answers prompts: vLLM servers, the actor's own decoder, or recorded rollouts.

Start at ``generator.py``. ``servers/`` starts and supervises vLLM, ``weights/`` hands it new weights.
"""
