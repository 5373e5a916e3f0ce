"""One command from images to a trained, evaluated and exported model: `m3ae-fast pretrain photos/ --out run`.

The chosen settings are written to OUT/config.json, which can be passed to `m3ae-fast train --config`. The stages use
the functions of the other commands.
"""

# error message if `pretrain` is called on several ranks
SEVERAL_RANKS = (
    "pretrain runs as a single process; on several GPUs, train with the config that it writes (`torchrun "
    "--nproc-per-node N -m m3ae_fast train --config OUT/config.json --resume auto`), then run pretrain again"
)
RESUME_NOTE = "run the same command again to resume"
