"""Tests of hetero_ppo and megatron_bridge. Helpers are in ``helpers/``; every test module imports them from ``tests.helpers``."""
