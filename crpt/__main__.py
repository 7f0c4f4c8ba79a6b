"""`python -m crpt`: what commands there are."""

import signal
import sys

COMMANDS = {
    "train": "the whole pipeline, from random play to an agent that is compared with chance",
    "collect": "random play in every domain, into one dataset",
    "pretrain": "the encoder, from random play; also by torchrun",
    "probe": "what an encoder knows of the simulator's state, beside the same one at init",
    "finetune": "SAC on a frozen encoder",
    "evaluate": "an agent beside uniform random actions",
    "dataset": "datasets: what is in them, whether they are whole, and to and from other formats",
    "ablate": "variants of a preset, trained and probed alike, in a table",
    "doctor": "what of this machine crpt can use, and what keeps it from the rest",
    "bench": "how fast operators, pre-training, replay and collecting are here",
}


def main() -> int:
    width = max(map(len, COMMANDS))
    usage = "usage: python -m crpt.COMMAND [--help], COMMAND one of"
    lines = [usage, *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())]
    asked = sys.argv[1:]
    if asked in ([], ["-h"], ["--help"]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no error if nobody reads
        print(*lines, sep="\n")
        return 0
    if asked[0] in COMMANDS:
        lines.insert(0, f"{asked[0]} is a module of its own: python -m crpt.{' '.join(asked)}")
    else:
        lines.insert(0, f"COMMAND should be one of those below, got {asked[0]}")
    print(*lines, sep="\n", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
