"""`python -m crpt`: what commands there are."""

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

if __name__ == "__main__":
    width = max(map(len, COMMANDS))
    print("usage: python -m crpt.COMMAND [--help], COMMAND one of")
    print(*(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()), sep="\n")
