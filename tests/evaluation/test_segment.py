"""Segmentation by patch features: metrics agree with their definitions, and shapes are segmented from the
background."""

import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import jaccard_score

from m3ae_fast.base.bad_samples import BadSample
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.parquet import read_parquet
from m3ae_fast.config.evaluation import EvaluationConfig, SegmentConfig
from m3ae_fast.evaluation.baseline_results import MODEL, UNTRAINED
from m3ae_fast.evaluation.compare_results import compare_results
from m3ae_fast.evaluation.run_report import write_report
from m3ae_fast.evaluation.segment import Counts, Images, Neighbours, count, fit, measured, patch_labels, upsampled
from m3ae_fast.heads.feature_bank import FeatureBank
from m3ae_fast.heads.modules import LinearProbeHead
from m3ae_fast.images.crops import centre_crop
from m3ae_fast.images.label_mask import mask_view, read_mask
from m3ae_fast.process.ranks import join_ranks
from tests.evaluation.conftest import figure_names, same_as_baseline, settings
from tests.helpers.labelled import labelled_tar
from tests.helpers.shards import write_tar

IGNORED = 255


def png(array, mode=None):
    out = io.BytesIO()
    Image.fromarray(array, mode).save(out, "PNG")
    return out.getvalue()


def shapes(number):
    """Return a noisy image with a disc and a square of other colours, and its mask with the classes 0, 1 and 2. The
    upper six rows of the mask are ignored."""
    random = np.random.RandomState(number)
    image, mask = np.full((48, 40, 3), (30, 60, 220)), np.zeros((48, 40), np.uint8)
    y, x = np.mgrid[:48, :40]
    disc = (y - random.randint(8, 20)) ** 2 + (x - random.randint(8, 32)) ** 2 < 64
    top, left = random.randint(26, 34), random.randint(2, 24)
    square = (y >= top) & (y < top + 14) & (x >= left) & (x < left + 14)
    for place, colour, label in ((disc, (230, 50, 40), 1), (square, (40, 200, 60), 2)):
        image[place], mask[place] = colour, label
    mask[:6] = IGNORED
    noise = random.randint(-20, 20, image.shape)
    return png((image + noise).clip(0, 255).astype(np.uint8)), png(mask)


def shapes_tar(path, numbers, without=(), broken=()):
    """Write a shard of `shapes`. Some images are `without` a mask, and others are `broken`."""
    members = []
    for number in numbers:
        image, mask = shapes(number)
        members.append((f"{number:03}.png", image[:60] if number in broken else image))
        members += [] if number in without else [(f"{number:03}.mask.png", mask)]
    return write_tar(path, members)


def counted(*arguments):
    return Counts(*count(*arguments).numpy().transpose(1, 0, 2))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    train = shapes_tar(folder / "train.tar", range(40), without=(3,), broken=(5,))
    return train, shapes_tar(folder / "val.tar", range(50, 67), broken=(52,))


SHORT = settings("segment.steps=150", "segment.batch=16", "segment.peak_lr=1e-2")


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "knn"])
def test_segmentation_exceeds_the_baseline_on_simple_shapes(transfer, masked, tmp_path, head, capsys):
    train, val = masked
    result = transfer("segment", *SHORT, *settings(f"segment.head={head}"), train=train, val=val)
    assert result["miou"] > 0.5 > 0.35 > result["chance_miou"] and "warnings" not in result
    assert (result["train_samples"], result["val_samples"], result["classes"], result["skipped"]) == (38, 16, 3, 2)
    output = capsys.readouterr().out
    assert "--train: 39 of 40 samples have a mask" in output and "ignored files in the shards" not in output
    assert f"segment: {result['verdict']}\n" in output and f"± {result['miou_se']:.4f}" in output
    assert figure_names(tmp_path / "out") == ["segmentation"]
    table = read_parquet(tmp_path / "out/predictions.parquet")
    assert sum(table["right"]) / sum(table["pixels"]) == pytest.approx(result["pixel_accuracy"])
    assert sum(table["pixels"]) == sum(row["pixels"] for row in result["per_class"]) < 16 * 32 * 32
    by_class = (np.array(table[f"class_{name}"]) for name in ("right", "pixels", "predicted"))
    assert Counts(*by_class).miou() == pytest.approx(result["miou"])
    (tmp_path / "out/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}))
    write_report(tmp_path / "out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "iou of each class" in page and f'<td class="number">{result["chance_miou"]:.1%}</td>' in page


@pytest.mark.slow
def test_two_segmentations_are_compared_as_a_model_and_its_baseline(transfer, masked, tmp_path):
    data, head = {"train": masked[0], "val": masked[1]}, settings("segment.head=knn")
    line, expected = same_as_baseline(transfer, tmp_path, "segment", *head, **data)
    assert line == f"mIoU: {expected}"
    transfer("segment", *head, *settings("segment.ignore_label=2"), out="ignored", **data)
    with pytest.raises(UserError, match="the masks differ; choose results with the same masks, the same segment"):
        compare_results([tmp_path / "one", tmp_path / "ignored"])


@pytest.mark.slow
def test_a_class_that_occurs_only_in_held_out_masks_has_an_iou_of_0(transfer, masked, tmp_path, capsys):
    members = []
    for number in range(8):
        image, mask = shapes(number)
        ids = np.array(Image.open(io.BytesIO(mask)))
        ids[ids == 2] = IGNORED
        members += [(f"{number:03}.png", image), (f"{number:03}.mask.png", png(ids))]
    train = write_tar(tmp_path / "train.tar", members)
    result = transfer("segment", *settings("segment.head=knn"), train=train, val=masked[1])
    note = "note: no training image has pixels of the classes 2, whose IoU therefore counts as 0"
    assert note in capsys.readouterr().out
    found = [row["iou"] for row in result["per_class"]]
    assert result["classes"] == 3 and found[2] == 0 and result["miou"] == pytest.approx(sum(found) / 3)


@pytest.mark.slow
def test_pixels_are_segmented_as_a_baseline(transfer, masked):
    train, val = masked
    result = transfer("segment", *SHORT, train=train, val=val, baselines=True)
    assert [*result["baselines"]] == ["random weights", "downscaled pixels"]
    assert result["baselines"]["downscaled pixels"]["miou"] > 0.5 > result["chance_miou"]


def test_metrics_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    truth, predicted = (torch.randint(4, (6, 8, 8), dtype=torch.uint8, generator=generator) for _ in range(2))
    truth[truth == 3] = IGNORED  # class 3 is predicted but never correct
    counts = counted(predicted, truth, 4, IGNORED)
    seen = truth != IGNORED
    ious = jaccard_score(truth[seen], predicted[seen], average=None, labels=range(4), zero_division=0)
    np.testing.assert_allclose(counts.iou(), ious)
    assert counts.miou() == pytest.approx(ious.mean())
    result = measured({MODEL: counts}, 0)
    assert result["pixel_accuracy"] == pytest.approx((truth == predicted)[seen].double().mean().item())
    largest = int(truth[seen].bincount().argmax())
    alone = jaccard_score(truth[seen], np.full(int(seen.sum()), largest), average="macro", zero_division=0)
    assert result["chance_miou"] == pytest.approx(alone)
    assert result["warnings"][0].startswith("the model is not significantly better than the largest class: mIoU")
    apart = [count(predicted[i : i + 1], truth[i : i + 1], 4, IGNORED)[0, 0] for i in range(6)]
    np.testing.assert_array_equal(counts.right_MC, apart)
    everything = counted(predicted, predicted, 5, None)  # a class that does not occur has no IoU
    assert everything.miou() == 1.0 and np.isnan(everything.iou()[4])
    result = measured({MODEL: everything}, 0)
    assert result["classes"] == 4 and [row["class"] for row in result["per_class"]] == [0, 1, 2, 3]


def test_the_standard_error_of_a_single_image_is_undefined():
    """Images of which all pixels are ignored have no influence."""
    right = np.array([[9, 8], [0, 0], [0, 0]])
    pixels = np.array([[10, 10], [0, 0], [0, 0]])
    none = np.zeros_like(pixels)
    result = measured({MODEL: Counts(right, pixels, pixels), UNTRAINED: Counts(none, pixels, pixels)}, 0)
    assert result["miou"] == pytest.approx((9 / 11 + 8 / 12) / 2)
    assert result["warnings"][0].startswith(
        "the standard error of mIoU cannot be estimated from these held-out samples"
    )
    assert result["baselines"] == {UNTRAINED: {"miou": 0.0}} and not {"miou_se", "verdict"} & result.keys()


def test_images_of_which_all_pixels_are_ignored_do_not_prevent_a_standard_error():
    """A bootstrap sample may contain only images of which all pixels are ignored."""
    pixels = np.array([[10, 10], [10, 10], [0, 0], [0, 0]])
    right = np.array([[9, 8], [5, 6], [0, 0], [0, 0]])
    result = measured({MODEL: Counts(right, pixels, pixels)}, 0)
    assert 0 < result["miou_se"] < 1 and "warnings" not in result


def test_the_standard_error_equals_the_deviation_over_redrawn_images():
    random = np.random.default_rng(0)
    right = random.integers(0, 50, (300, 30, 1))
    draws = [Counts(np.hstack((each, 50 - each)), np.full((30, 2), 50), np.full((30, 2), 50)) for each in right]
    assert measured({MODEL: draws[0]}, 0)["miou_se"] == pytest.approx(np.std([each.miou() for each in draws]), rel=0.35)


def test_a_segmentation_head_is_trained_on_all_pixels_as_in_plain_torch():
    """The head consists of a BatchNorm and a linear layer. AdamW minimises the cross-entropy over all pixels that are
    not ignored."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(6, 4, 5, generator=generator)
    masks = torch.randint(3, (6, 8, 8), generator=generator).to(torch.uint8)
    masks[0, :3] = IGNORED
    settings, steps = SegmentConfig(steps=12, batch=6, peak_lr=0.05, weight_decay=0.1), 12
    given = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}})
    with join_ranks() as ranks:
        bank = FeatureBank([*"abcdef"], patches, torch.arange(6))
        job = SimpleNamespace(ranks=ranks, config=given, heartbeats=SimpleNamespace(mark=lambda what: None))
        found = fit(Images(bank, masks), 3, settings, job)(patches)
    torch.manual_seed(given.run.seed)
    linear = LinearProbeHead(5, 3).linear
    mean, var = patches.flatten(0, 1).mean(0), patches.flatten(0, 1).var(0, unbiased=False)
    inputs, kept = (patches - mean) / (var + 1e-5).sqrt(), 0.9**steps
    optimizer = torch.optim.AdamW(linear.parameters(), weight_decay=0.1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / steps)) / 2
        pixels = linear(inputs).transpose(1, 2).reshape(6, 3, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
        optimizer.zero_grad()
        F.cross_entropy(pixels, masks.long(), ignore_index=IGNORED).backward()
        optimizer.step()
    inputs = (patches - (1 - kept) * mean) / ((1 - kept) * var + kept + 1e-5).sqrt()  # with running statistics
    torch.testing.assert_close(found, linear(inputs).log_softmax(-1), rtol=1e-4, atol=1e-4)


def test_neighbouring_patches_vote_with_the_fractions_of_their_pixels():
    """The votes are computed one by one. Voting patches are evenly spaced over those that are not ignored."""
    generator = torch.Generator().manual_seed(0)
    patches, queries = (torch.randn(count, 16, 6, generator=generator).half() for count in (5, 3))
    masks = torch.randint(3, (5, 8, 8), generator=generator).to(torch.uint8)
    masks[1], masks[2, :, :5] = IGNORED, IGNORED
    sections = {"segment": {"bank_patches": 30}, "knn": {"k": 7, "temperature": 0.2}}
    config = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, **sections})
    bank = FeatureBank([*"abcde"], patches, torch.arange(5))
    with join_ranks() as ranks:
        head = Neighbours(Images(bank, masks), 3, SimpleNamespace(ranks=ranks, config=config))
    found = head(queries.float()).flatten(0, 1)
    patches, queries = (part.flatten(0, 1).double() for part in (patches, queries))
    cells = masks.unflatten(2, (4, 2)).unflatten(1, (4, 2)).permute(0, 1, 3, 2, 4).reshape(80, 4)
    voters = (F.normalize(head.bank.stored_SD.double(), dim=1) @ F.normalize(patches, dim=1).T).argmax(1)
    for image in range(5):
        seen = [row for row in range(16 * image, 16 * image + 16) if (cells[row] != IGNORED).any()]
        places = [seen.index(row) for row in voters.tolist() if row // 16 == image]
        assert len(places) == min(30 // 5, len(seen)) and places[:1] in ([0], [])
        gaps = np.diff([*places, len(seen)])
        assert not places or max(gaps) - min(gaps) <= 1
    for query, scores in zip(queries, found):
        similarity, votes = torch.cosine_similarity(query, patches[voters]), torch.zeros(3)
        for number in similarity.argsort(descending=True)[:7].tolist():
            counted = cells[voters[number]]
            counted = counted[counted != IGNORED]
            shares = torch.stack([(counted == label).float().mean() for label in range(3)])
            votes += math.exp(similarity[number] / 0.2) * shares
        torch.testing.assert_close(scores, votes / votes.sum(), rtol=1e-4, atol=1e-5)


def test_equally_similar_patches_vote_in_the_order_of_the_images_on_any_ranks():
    """Images are repeated with different masks, so that only some of the equally similar patches are neighbours."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 16, 6, generator=generator).half().repeat(4, 1, 1)
    masks = torch.randint(3, (8, 8, 8), generator=generator).to(torch.uint8)
    sections = {"segment": {"bank_patches": 128}, "knn": {"k": 3, "temperature": 0.2}}
    config = EvaluationConfig.model_validate({"data": {"train": [{"shards": "x"}]}, **sections})
    found = []
    for order in ((0, 1), (1, 0)):  # parts of two ranks, as if the first rank had the images with even or odd numbers

        def gather(own, order=order):
            return [{number: own[number] for number in own if number % 2 == rank} for rank in order]

        ranks = SimpleNamespace(gather=gather, device=torch.device("cpu"))
        bank = FeatureBank([*"abcdefgh"], patches, torch.arange(8))
        head = Neighbours(Images(bank, masks), 3, SimpleNamespace(ranks=ranks, config=config))
        found.append(head(patches[:2].float()))
    assert torch.equal(*found)
    shares = patch_labels(masks[[0, 2, 4]], 4, 3, IGNORED).mean(0) / 4
    torch.testing.assert_close(found[0][0], shares)


def test_the_labels_of_a_patch_are_pixel_counts_by_class():
    mask = torch.arange(32).reshape(1, 4, 8).to(torch.uint8) % 3
    mask[0, 0, 0] = IGNORED
    counts = patch_labels(mask.expand(2, 4, 8)[:, :, :4].contiguous(), 2, 3, IGNORED)
    assert counts.shape == (2, 4, 3)
    for row, (top, left) in enumerate(((0, 0), (0, 2), (2, 0), (2, 2))):
        cell = mask[0, top : top + 2, left : left + 2]
        assert counts[1, row].tolist() == [(cell == label).sum() for label in range(3)]
    assert patch_labels(mask[:, :, :4], 2, 256, None).sum() == 16  # nothing is ignored


def test_scores_are_upsampled_bilinearly():
    scores = torch.rand(3, 16, 5, generator=torch.Generator().manual_seed(0))
    maps = scores.reshape(3, 4, 4, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, scale_factor=8, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(upsampled(scores, 4, 32).long(), expected)


def test_a_mask_is_cropped_and_resized_like_its_image():
    """Image and mask are cropped to the same central square, in which edges are at the same positions."""
    for height, width in ((48, 40), (40, 49), (7, 8)):
        mask = np.zeros((height, width), np.uint8)
        mask[height // 2 :, width // 3 :] = 255
        seen = mask_view(read_mask(png(mask), png(mask)), 32)
        image = centre_crop(torch.from_numpy(mask)[None], 32)[0]
        assert (image[seen == 255] > 100).all() and (image[seen == 0] < 155).all()


def test_palette_and_16_bit_masks_contain_class_ids():
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    indexed = Image.fromarray(ids)
    indexed.putpalette([*range(255, 255 - 18, -1)])
    out = io.BytesIO()
    indexed.save(out, "PNG")
    assert Image.open(out).mode == "P"
    image = png(np.zeros((2, 3, 3), np.uint8))
    for data in (out.getvalue(), png(ids.astype(np.uint16)), png(ids)):
        assert read_mask(data, image).tolist() == ids.tolist()
    assert read_mask(png(ids > 2), image).tolist() == (ids > 2).astype(int).tolist()
    for data, message in (
        (png(np.zeros((2, 3, 3), np.uint8)), "the mask has mode RGB; it must have one channel"),
        (png(np.full((2, 3), 300, np.uint16)), "the mask has the class id 300; ids must be from 0 to 255"),
        (png(ids)[:45], "cannot be decoded"),
        (b"GIF89a", "the mask is not a PNG"),
        (png(ids.T.copy()), "the mask has 2 x 3 pixels, but the image has 3 x 2"),
    ):
        with pytest.raises(BadSample, match=message):
            read_mask(data, image)


@pytest.mark.slow
def test_user_errors_are_reported_in_one_line(transfer, masked, tmp_path):
    image, _ = shapes(0)
    one = write_tar(tmp_path / "one.tar", [("0.png", image), ("0.mask.png", png(np.zeros((48, 40), np.uint8)))])
    rgb = write_tar(tmp_path / "rgb.tar", [("0.png", image), ("0.mask.png", image)])
    rotated = write_tar(
        tmp_path / "rotated.tar", [("0.png", image), ("0.mask.png", png(np.eye(40, 48, dtype=np.uint8)))]
    )
    plain = labelled_tar(tmp_path / "plain.tar", range(4))
    for options, train, message in (
        ([], plain, "no sample has a mask, KEY.mask.png next to its image; make shards"),
        ([], one, "its masks have 1 class besides segment.ignore_label 255; at least two are"),
        ([], rotated, r"is invalid \(the mask has 48 x 40 pixels, but the image has 40 x 48\); repair or remove it"),
        ([], rgb, r"is invalid \(the mask has mode RGB; it must have one channel of class ids\); repair"),
        (["--set", "model.resize=native"], masked[0], "segment needs images of one size; add --set model.resize=sq"),
        (["--set", "encode.pool=cls"], masked[0], "segment does not use this setting; of encode, it uses only batch"),
        (
            ["--set", "train.steps=3"],
            masked[0],
            "train.steps: segment does not use this setting; did you mean segment.steps",
        ),
    ):
        with pytest.raises(UserError, match=message):
            transfer("segment", *options, train=train, val=masked[1])
        assert not (tmp_path / "out/result.json").exists()
    with pytest.raises(UserError, match="unrecognized arguments: --labels cls"):
        transfer("segment", "--labels", "cls", train=masked[0], val=masked[1])
