"""One command from images to a trained, measured and exported model: `m3ae-fast pretrain photos/ --out run`.

The chosen settings are written to OUT/config.json, which can be passed to `m3ae-fast train --config`. The stages use
the functions of the other commands.
"""

GOES_ON = "run the same command again to resume"
