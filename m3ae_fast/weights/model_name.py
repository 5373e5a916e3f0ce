"""Names of models on the command line. This module imports nothing, so that `--help` is fast."""

# prefixes of a model name: for the same network with random weights, and for downscaled pixels as features
RANDOM, PIXELS = "random:", "pixels:"
MASK = "[MASK]"  # placeholder for one token of a caption
MODEL_HELP = (
    "a run folder (its last checkpoint is used, with the averaged weights if train.ema is set), a checkpoint, an "
    "export folder, a name on the Hub, or random:MODEL for the same network with random weights"
)
CLASSIFIER_HELP = "the OUT folder of a logistic, linear or finetune task"
