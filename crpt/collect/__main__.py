"""`python -m crpt.collect`."""

from crpt.commands import run

if __name__ == "__main__":
    run("collect")
