"""The method's open questions as commands: `python -m crpt.ablate STUDY`."""
