"""The model card: the README.md of a folder of weights, which the Hugging Face Hub displays."""

from __future__ import annotations

import json

from m3ae_fast.config import POOLINGS, ModelConfig

# the Hub's value for a licence that it does not list; the card asks for the actual licence
_CARD = """---
library_name: m3ae-fast
license: other
tags: [{tags}]
---

# {name}

{what}, arXiv 2205.14204: a ViT encoder with {depth} blocks of width {emb_dim} for {images} in patches of
{patch_size} x {patch_size}{text}.

```python
from m3ae_fast.model import M3AE

model = M3AE.from_pretrained("{name}")
features = model.encode({arguments})  # files, PIL images or arrays{captions} -> float32 [S, {features}]
tokens = model.representation(pixels)  # {pixels} [B, {channels}, {side}, {side}] -> [B, 1 + {patches}, {emb_dim}]
```

Licence: to be filled in by the publisher of these weights; the licence of the training data may restrict it.
{run}
## Model

```json
{config}
```
"""


def model_card(name: str, config: ModelConfig, run: str = "") -> str:
    """Return the card of the model `name`. `run`: Markdown about the training run of the weights."""
    c = config
    what = "A multimodal masked autoencoder (M3AE)" if c.vocab_size else "An image-only masked autoencoder (MAE, M3AE)"
    return _CARD.format(
        **c.model_dump(),
        name=name,
        side=c.image_size,
        features=POOLINGS[c.default_pool(texts=bool(c.vocab_size))].vectors * c.emb_dim,
        what=what,
        tags="masked-autoencoder, " + ("image-text" if c.vocab_size else "image-feature-extraction"),
        images=f"{c.image_size} x {c.image_size} images" if c.resize == "square" else "images of any aspect ratio",
        patches=c.patches_per_image,
        pixels="normalised" if c.image_dtype == "float32" else c.image_dtype,
        text=f" and for captions of up to {c.text_length} tokens" if c.vocab_size else "",
        run=f"\n{run}" if run else "",
        arguments="images, texts" if c.vocab_size else "images",
        captions=", strings" if c.vocab_size else "",
        config=json.dumps(c.model_dump(mode="json", exclude={"init_from"}), indent=2),
    )
