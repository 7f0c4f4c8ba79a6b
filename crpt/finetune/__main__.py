"""`python -m crpt.finetune`."""

from crpt.commands import run

if __name__ == "__main__":
    run("finetune")
