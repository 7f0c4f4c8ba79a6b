"""`python -m crpt.pretrain`."""

from crpt.commands import run

if __name__ == "__main__":
    run("pretrain")
