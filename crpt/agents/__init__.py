"""Downstream reinforcement learning on the frozen encoder."""

from crpt.agents.intrinsic_reward import IntrinsicReward
from crpt.agents.sac import SAC, FeatureBatch

__all__ = ["SAC", "FeatureBatch", "IntrinsicReward"]
