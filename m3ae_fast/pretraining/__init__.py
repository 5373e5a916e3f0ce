"""One command from images to a trained, measured and exported model: `m3ae-fast pretrain photos/ --out run`.

What is chosen stands in OUT/config.json, which `train.py --config` takes; every stage is one of the other programs.
"""

GOES_ON = "the same line goes on"
