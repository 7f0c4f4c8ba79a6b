"""`python -m crpt.train`."""

from crpt.commands import run

if __name__ == "__main__":
    run("train")
