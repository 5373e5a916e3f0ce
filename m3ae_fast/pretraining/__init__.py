"""One command from images to a trained, measured and exported model: `m3ae-fast pretrain photos/ --out run`.

The chosen settings are written to OUT/config.json, which can be passed to `train.py --config`. Every stage is one of
the other programs.
"""

GOES_ON = "run the same command again to resume"
