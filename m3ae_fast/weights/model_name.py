"""The ways to name a model on a command line. Imports nothing, so that `--help` is fast."""

# prefixes: the same network with random weights; the pixels that a model sees, scaled down, as features
RANDOM, PIXELS = "random:", "pixels:"
MASK = "[MASK]"  # stands for one token of a caption
MODEL_HELP = (
    "a run folder (its last checkpoint; with train.ema the average), a checkpoint, an export folder, a hub name, or "
    "random:MODEL for the same network with random weights"
)
CLASSIFIER_HELP = "the OUT folder of a linear or finetune task"
