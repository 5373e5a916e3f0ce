"""Patch a Hugging Face ViT-MAE to use this library's ops, and compare the losses, which are equal.

    pip install transformers
    python kernels/examples/hugging_face_vit_mae.py

The patched model also accepts uint8 images: they are normalised, split into patches and compared with the predictions
inside the ops, without intermediate tensors in memory. This example uses random weights;
`ViTMAEForPreTraining.from_pretrained(...)` works in the same way.
"""

import copy

import torch
from m3ae_kernels import patch_model
from transformers import ViTMAEConfig, ViTMAEForPreTraining

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # as in the model's image processor


def main() -> tuple[float, float]:
    """Print and return the losses of the original model and of the patched model."""
    torch.manual_seed(0)
    config = ViTMAEConfig(
        image_size=64, patch_size=8, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=384,
        decoder_hidden_size=48, decoder_num_hidden_layers=1, decoder_num_attention_heads=3,
        decoder_intermediate_size=192, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config).train()
    fused = patch_model(copy.deepcopy(model), mean=MEAN, std=STD)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    noise = torch.rand(4, 64)  # fixes the masks
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    losses = model((images / 255 - mean) / std, noise=noise).loss, fused(images, noise=noise).loss
    losses[1].backward()
    print(f"ViTMAEForPreTraining {losses[0].item():.6f}  fused {losses[1].item():.6f}")
    return losses[0].item(), losses[1].item()


if __name__ == "__main__":
    main()
