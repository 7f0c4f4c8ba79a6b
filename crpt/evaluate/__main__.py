"""`python -m crpt.evaluate`."""

from crpt.commands import run

if __name__ == "__main__":
    run("evaluate")
