"""What pre-training minimises, one objective a file."""

from crpt.objectives.crptpro import CRPTPro

__all__ = ["CRPTPro"]
