"""`python -m crpt.probe`."""

from crpt.commands import run

if __name__ == "__main__":
    run("probe")
