"""`python -m crpt.doctor`: what of this machine crpt can use, and what keeps it from the rest."""
