"""The evaluation tasks and their options. This module does not import torch, so that `--help` is fast.

The fields of a task's class are its options on the command line and its arguments in Python, with the string below a
field as the help. The first paragraph of a docstring is the description in the help, and all of it is a section of
docs/evaluation-tasks.md, which `python docs/write_settings.py` generates. A new option is a field, which the task reads
from `job.options`. An option that changes the samples is read in `Job.open_labelled`. A new task needs a class, its
entry in `TASKS`, a module of its name in this package with a function `run(job)`, and a section of EvaluationConfig if
it has settings. A new frozen probe also needs an entry in `PROBES` of `heads/probes.py`, and its name in `Probe` if
`compare` is to offer it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from m3ae_fast.base import s3_and_gs
from m3ae_fast.base.errors import UserError
from m3ae_fast.base.libraries import require_libraries
from m3ae_fast.config.arguments import (
    SHARDS,
    CommaList,
    Labels,
    Layers,
    Option,
    Resume,
    Shards,
    WithSettings,
    names,
    output,
)
from m3ae_fast.config.evaluation import CROPS, FINETUNE, LINEAR, SHOWN, Uses
from m3ae_fast.config.poolings import POOLS, Pool
from m3ae_fast.weights.model_name import (
    CLASSIFIER_HELP,
    FEATURES_HELP,
    IMAGE_FEATURES,
    LIBRARY_HELP,
    MODEL_HELP,
    RANDOM,
    is_network,
)

DRAWS = 5  # number of draws for each number of shots

Probe = Literal["knn", "logistic", "attentive"]  # probes that `compare` can use
PROBE_NAMES: tuple[Probe, ...] = get_args(Probe)
Modality = Literal["image", "text", "paired"]
_IN_RESULT = ("model", "modality", "train", "val", "out")  # recorded elsewhere in the result
_NAMED = re.compile(r"([A-Za-z0-9_-]+)=(.+)", re.DOTALL)  # NAME=SHARDS, the first value of an option --ood


def _model_names(value: Any) -> list[str]:
    try:
        return names(value)
    except ValueError as error:
        how = "write the model with its method save_pretrained(FOLDER), and pass FOLDER"
        raise UserError(f"model: {error}; {how}") from None


def _pools(value: Any) -> Any:
    return POOLS if value == "all" else value


def named_sets(given: Any) -> Any:
    """Return a dict from the name of each set to its shards. `given`: such a dict, or a list with the arguments of each
    --ood. The name of a single set may be "". Raises UserError if one of several sets has no name, or if two have the
    same name."""
    if isinstance(given, Mapping):
        return {name: names(shards) for name, shards in given.items()}
    if not isinstance(given, Sequence) or any(isinstance(each, str) for each in given):
        raise ValueError('must be a dict of shards by the name of their set, such as {"other": "other-*.tar"}')
    sets: dict[str, list[str]] = {}
    for first, *rest in given:
        match = _NAMED.fullmatch(first)
        name, shards = match.groups() if match else ("", first)
        if name in sets or (not name and len(given) > 1):
            raise UserError(f"ood {first}: give each set a different name, such as --ood other={shards}")
        sets[name] = [shards, *rest]
    return sets


Model = Annotated[str, Option("model", metavar="MODEL")]
Models = Annotated[
    Sequence[str], BeforeValidator(_model_names), Field(min_length=1), Option("model", metavar="MODEL", nargs="+")
]
_GRID = "layers, poolings and few samples"
Pools = Annotated[Sequence[Pool], CommaList, BeforeValidator(_pools), Option(metavar="all|NAME,NAME", group=_GRID)]
Shots = Annotated[
    Sequence[Annotated[int, Field(gt=0)]], CommaList, AfterValidator(sorted), Option(metavar="N,N", group=_GRID)
]
OutsideSets = Annotated[
    Mapping[str, Shards],
    BeforeValidator(named_sets),
    Field(min_length=1),
    Option(nargs="+", action="append", metavar="[NAME=]SHARDS"),
]


class Task(WithSettings):
    """A task and its options. The module of its name has a function `run(job)`, which returns the result, or None if
    the task was stopped before its end."""

    uses: ClassVar[Uses] = Uses(("encode",))  # the settings that the task uses
    LIBRARIES: ClassVar[tuple[str, ...]] = ()  # optional libraries that the task requires

    val: Shards = Field(description=f"held-out samples in {SHARDS}")
    out: Annotated[Path, BeforeValidator(output()), Option(metavar="OUT")]
    """output folder, which must not contain a result"""

    @classmethod
    def name(cls) -> str:
        """Return the name of the task."""
        return cls.__name__.lower()

    @classmethod
    def about(cls) -> str:
        """Return the description of the task."""
        text = " ".join((cls.__doc__ or "").partition("\n\n")[0].split()).removesuffix(".")
        return text[:1].lower() + text[1:]

    @classmethod
    def unknown(cls, name: str) -> str:
        if any(name in other.model_fields for other in TASKS.values()):
            return f"{name}: {cls.name()} does not use it; leave it out"
        return super().unknown(name)

    @property
    def uses_now(self) -> Uses:
        """Return the settings that the task uses with these options."""
        return self.uses

    def entries(self) -> dict[str, Any]:
        """Return the options for result.json, as plain JSON data. Options that the settings or other fields of the
        result contain are left out."""
        return self.model_dump(mode="json", exclude={*WithSettings.model_fields, *_IN_RESULT})

    @property
    def shards(self) -> list[str]:
        """Return all shards in the options."""
        return [*self.val]

    def require(self) -> None:
        """Raise UserError if a library that the task or its shards require is not installed."""
        require_libraries(dict.fromkeys(("tensorboard", *self.LIBRARIES), self.name()))
        s3_and_gs.require(*self.shards)


class OneModel(Task):
    """A task that evaluates one model."""

    TAKES_IMAGE_FEATURES: ClassVar[bool] = False  # see `is_image_features`

    model: Model = Field(description=MODEL_HELP)

    @field_validator("model", mode="before")
    @classmethod
    def _is_one_model(cls, value: Any) -> str:
        models = _model_names(value)
        if len(models) != 1:
            raise UserError(f"{cls.name()} evaluates one model, not {len(models)}; to compare several, use compare")
        if not is_network(models[0]) and not cls.TAKES_IMAGE_FEATURES:
            *others, last = (name for name, task in TASKS.items() if getattr(task, "TAKES_IMAGE_FEATURES", False))
            raise UserError(
                f"{models[0]}: {cls.name()} needs a network; {', '.join(others)} and {last} accept {models[0]} "
                f"(for a folder of this name, write ./{models[0]})"
            )
        return models[0]

    @property
    def is_image_features(self) -> bool:
        """Return whether the model is one of IMAGE_FEATURES or a model of another library, whose features have no
        layers and poolings."""
        return not is_network(self.model)


class WithTraining(Task):
    """A task with training samples."""

    train: Shards = Field(description=f"training samples in {SHARDS}")

    @property
    def shards(self) -> list[str]:
        return [*self.train, *super().shards]


class WithLabels(Task):
    """A task whose samples have labels, as opposed to masks."""

    labels: Labels = "cls"
    """source of the labels: cls (integers in KEY.cls; default) or json.FIELD (a field of KEY.json)"""


class WithModality(Task):
    """A task whose encoder may see captions."""

    modality: Modality | None = None
    """input of the encoder (default: image)"""


class WithResume(WithLabels):
    """A task that can be resumed from a checkpoint."""

    resume: Resume = "no"
    """auto: continue from the last checkpoint in OUT, if any; no (default): start a new run; PATH: continue from that
    checkpoint or run folder"""


class WithBaselines(OneModel):
    """A task that evaluates baselines too.

    A high accuracy is not necessarily due to pre-training: the colours of the images may reveal the classes. Every task
    that learns from labelled images therefore also evaluates baselines on the same samples:

    - random weights (`random:MODEL`): the network of MODEL, randomly initialised with the seed `run.seed`;
    - downscaled pixels (`pixels`): the pixels, scaled down to 16 x 16 and normalised by the mean and standard deviation
      of the training images;
    - colour histogram (`histogram`): the square roots of the fractions of the pixels in 4 x 4 x 4 colours; for images
      that do not have three channels, in 16 bins for each channel;
    - HOG (`hog`): histograms of oriented gradients, with 9 orientations, cells of 8 x 8 pixels and blocks of 2 x 2
      cells: 900 numbers. HOG needs scikit-image (the extra `evaluate`); without this library, HOG is left out with a
      warning.

    The last three are computed from the central square of each image, resized to 48 x 48, with the channels and the
    value range of the training files, so that they are the same for all models. The only baselines of `segment` are
    random weights and the pixels of each patch.

    A printed line shows the metrics of each baseline, and the paired difference between MODEL and the baseline;
    `baselines` in `result.json` contains both. A warning names the baselines that MODEL does not significantly
    exceed. `knn`, `logistic` and `segment` use the same classifier for the baselines as for MODEL, with
    hyper-parameters chosen separately by the same rule. The other tasks use logistic regression, so that no second
    training is necessary. With `--layers`, `--pools` or `--shots`, the baselines are compared with the accuracy `top1`
    of the result.

    Without these three options, `knn` and `logistic` also evaluate the features of MODEL and HOG together, because they
    are often more accurate than either. Both parts are scaled to unit length, and concatenated. `with_hog` in
    `result.json` contains the accuracies, and the paired differences from MODEL and from HOG. [A model with
    HOG](guide/comparing.md#a-model-with-hog) shows how to compute such features.
    """

    baselines: bool = True
    """evaluate the baselines, which are random weights and features that are computed without a network
    (default: they are evaluated, unless MODEL is a baseline or the encoder sees captions)"""

    def evaluates_baselines(self, modality: Modality) -> bool:
        """Return whether baselines are evaluated. `modality`: the input of the encoder."""
        is_baseline = self.model.startswith(RANDOM) or self.is_image_features
        return self.baselines and modality == "image" and not is_baseline


class WithLists(WithLabels):
    """A task whose samples may have lists of labels.

    The field given by `--labels` may contain a list of numbers or names for each sample, such as
    `"tags": ["dog", "beach"]`. An empty list means that the sample has none of the classes. With `knn`, each neighbour
    votes for all of its labels. `logistic` and `attentive` minimise a binary cross entropy for each class.

    The pooling and the hyper-parameters are chosen as for single labels, but by the mean average precision in place of
    the accuracy, and `logistic` uses the penalty with the highest mean average precision. The classes of the classifier
    that `logistic` saves are independent: the sigmoid of a logit is the probability of its class. `robustness` and
    `ood` do not accept this classifier. `--shots` cannot be used. `attentive` needs `attentive.online=false` if the
    patch tokens do not fit into memory. These metrics are reported:

    - `map`: mean average precision, averaged over the classes that occur in the held-out samples;
    - `per_class`: number of samples and average precision of each class;
    - `chance_map`: expected `map` of random scores, which is the fraction of the samples that have a class, averaged
      over the classes.

    Labels that do not occur in the training samples are left out, with a note. The standard error of `map` and the
    interval of its difference from `chance_map` are computed by a bootstrap over samples, corrected for its bias:
    samples that are drawn repeatedly raise the average precision of rare labels. If the standard error and the interval
    cannot be estimated, for example from one held-out sample, both are left out with a warning.
    """


class WithGrid(OneModel, WithLists):
    """A task that can train probes on the features of several layers and poolings, and on few samples.

    The options `--layers`, `--pools` and `--shots` can be combined. One pass over the images covers all layers,
    poolings and numbers of shots, and all heads are trained together. `results` in `result.json` has a row for each
    combination of `layer`, `pool` and number of `shots`. The metrics outside `results`, such as `top1`, are those for
    the last layer, the first pooling and the largest number of shots. A figure shows the accuracy by layer or, for a
    single layer, by number of shots.

    The features of an earlier layer are the output of its block, with the final LayerNorm applied. For each number of
    shots, the samples are drawn five times, and the mean accuracy is reported with its 95 % confidence interval.
    """

    layers: Annotated[Layers, Option(metavar="all|N,N", group=_GRID)] = None
    """evaluate the features after each of these blocks, numbered from 1, in one pass over the images; OUT contains
    accuracies by depth, but no classifier (default: the last block)"""
    pools: Pools = ()
    """evaluate the features of each of these poolings in one pass over the images; OUT contains no classifier
    (default: only the pooling of encode.pool)"""
    shots: Shots = ()
    """few-shot evaluation: numbers of training samples per class, such as 1,5,10; for each number, samples are drawn
    several times (default: use all samples)"""

    @model_validator(mode="after")
    def _has_layers_and_poolings(self) -> WithGrid:
        if self.is_image_features and (self.layers is not None or self.pools):
            raise UserError(f"{self.model}: has no layers and no poolings; leave out layers and pools")
        return self

    @property
    def is_grid(self) -> bool:
        """Return whether the result has a row for each layer, pooling and number of training samples."""
        return bool(self.layers or self.pools or self.shots)

    def require(self) -> None:
        super().require()
        if self.shots:
            require_libraries({"scipy": "shots"})


class PooledProbe(WithGrid, WithBaselines, WithModality, WithTraining):
    """A probe of pooled features."""

    TAKES_IMAGE_FEATURES = True

    model: Model = Field(
        description=f"{MODEL_HELP}; or {LIBRARY_HELP}; or {', '.join(IMAGE_FEATURES)} for features that are computed "
        "from the images without a network"
    )

    @model_validator(mode="after")
    def _has_images(self) -> PooledProbe:
        if self.is_image_features and self.modality not in (None, "image"):
            raise UserError(f"{self.model}: is computed from images, not from captions; leave out modality")
        return self


class Knn(PooledProbe):
    """Measure the k-nearest-neighbour accuracy of frozen features.

    The class of a held-out sample is predicted by a vote of its k nearest training samples in feature space. The weight
    of a vote is exp(cosine similarity / `knn.temperature`). By default, four combinations are tried on a tenth of the
    training samples (at most 10,000), with the other training samples as neighbours: k of 1 or 20, and features as they
    are or standardised (to a mean of 0 and a standard deviation of 1). The most accurate combination is used. With
    `--set knn.k=10`, k is 10, and the features are not standardised. `result.json` contains the choice as `k` and
    `standardised`. `neighbours.png` shows some held-out samples with their nearest training samples.
    """

    uses = Uses(("encode", "knn", SHOWN))


class Logistic(PooledProbe):
    """Fit logistic regression to frozen features, with one of five L2 penalties; the classifier is saved in OUT.

    Each image is encoded once, and the features are standardised. L-BFGS then fits a multinomial logistic regression
    with an L2 penalty. This method has no learning rate and no random seed. It is usually at least as accurate as the
    linear probe and takes only a fraction of the time.

    The inverse strength of the penalty (scikit-learn's `C`) is selected from 0.0001, 0.001, 0.01, 0.1 and 1, each of
    which is evaluated on a held-out tenth of the training samples. Among the values whose accuracy is within one
    standard error of the best accuracy, the smallest value, which is the strongest penalty, is used (the
    one-standard-error rule of Breiman et al. 1984). With fewer than 1,000 training samples, the value with the best
    accuracy is used. The regression is then fitted to all training samples. `result.json` contains the value as
    `inverse_strength`.
    """


class Linear(WithResume, WithBaselines, WithModality, WithTraining):
    """Train a linear classifier on the frozen features of random crops, as in the official code; the classifier is
    saved in OUT.

    Each step encodes a batch of newly sampled crops. The head and the optimiser (LARS) are those of the official code.
    For a dataset of ImageNet's size, the hyper-parameters are also those of the official code; for smaller datasets,
    they are adapted (see below). Use this task to compare a model with published results; otherwise, use `logistic`.
    The official code uses the cls token, so add `--set encode.pool=cls` for such a comparison. If the linear probe is
    less accurate than `knn` on the same data, it was probably trained for too few steps.
    """

    uses = LINEAR


class Attentive(WithGrid, WithBaselines, WithTraining):
    """Train a linear classifier and a query that pools the frozen patch tokens.

    The query attends to the encoder's output tokens of the patches. At initialisation, the probe is equivalent to a
    linear probe on the mean of the patch features. With `--pools mean,cls`, linear heads on the mean and on the cls
    token are trained in the same pass, with the same optimiser, number of steps and candidate learning rates; the
    difference in accuracy between the attentive probe and these heads shows what the attention contributes.

    Five probes with different learning rates are trained simultaneously on nine tenths of the training samples, and the
    learning rate with the highest accuracy on the remaining tenth is selected. If the features are stored (see the next
    paragraph), a new probe is then trained with this learning rate on all training samples. With online training, the
    probe that was trained with the selected learning rate is used. The batch size and the number of steps are those of
    `linear`.

    The patch features of all images are stored: all ranks together need samples x layers x patches x width x 2 bytes,
    which the program prints before the task begins. If that much memory is not free, the probe is trained online: each
    step encodes a batch of newly sampled crops and discards its features, so that the memory of the probe does not grow
    with the dataset. The pooled features of the baselines are stored nevertheless; `--no-baselines` leaves them out.
    `attentive.online` overrides the choice. With `--shots`, the features are always stored.
    """

    uses = Uses(("encode", "attentive", *CROPS))

    pools: Pools = ()
    """also train linear classifiers on the features of each of these poolings, in the same training steps as the
    attentive probes and with the same hyper-parameters; OUT contains no classifier (default: only attentive probes)"""

    @property
    def is_grid(self) -> bool:
        return True


class Finetune(WithResume, WithBaselines, WithModality, WithTraining):
    """Train the encoder with a classification head; the classifier is saved in OUT.

    The head and the layer-wise learning rates are those of the official code. The batch size and the number of epochs
    depend on the number of training samples (see below). The classifier is evaluated at most about ten times during
    the training (`train.eval_every`). On a CPU, fine-tuning may take an hour.

    The baselines of this task are logistic regressions. Training from scratch is a stronger baseline, but takes as long
    as fine-tuning. To measure it, evaluate `random:MODEL` with this task, and compare both folders with the task
    `compare`.
    """

    uses = FINETUNE
    LIBRARIES = ("timm",)


class Segment(WithBaselines, WithTraining):
    """Segment images: classify frozen patch features with a linear head, or by a vote of the nearest training
    patches.

    Each image in the shards needs a label mask of the same size, `KEY.mask.png`, which `shards make --masks` adds.
    Samples without a mask are left out. With `segment.head=linear`, the default, a BatchNorm and a linear layer are
    trained for `segment.steps` steps; the target of a patch is the distribution of the classes among its pixels. With
    `segment.head=knn`, nothing is trained: the nearest of `segment.bank_patches` training patches vote with their class
    distributions, as in `knn`. The scores of the patches are upsampled bilinearly to the resolution of the image. There
    is no pooling, because each patch is classified by its own features. These metrics are reported:

    - `miou`: intersection over union of each class, computed over the pixels of all held-out images, and averaged over
      the classes;
    - `per_class`: the intersection over union of each class;
    - `chance_miou`: `miou` if the largest class is always predicted.

    Pixels with the label `segment.ignore_label` (255 by default) are excluded from training and from the metrics.
    Standard errors and intervals are computed by a bootstrap over images. Masks are cropped and resized in the same way
    as images: to the central square, at the model's resolution. The results are therefore not comparable with results
    that were computed with sliding windows or on uncropped images. `segmentation.png` shows held-out images next to
    their masks and the predictions. A high `miou` may be due to the positions of the objects alone, so compare it with
    the baselines.
    """

    uses = Uses(("encode.batch", "encode.precision", "segment", "knn", SHOWN))


class Robustness(OneModel, WithLabels):
    """Measure the accuracy of a classifier on adversarial images.

    The images are generated by projected gradient descent (PGD). The default is five passes over the held-out images:
    one over the clean images, and four attacks of 10 steps with different bounds. To shorten the task, evaluate fewer
    images, for example with `--set robustness.samples=1000`. The classifier determines the modality of the input.
    """

    uses = Uses(("robustness", "encode.batch"))

    model: Model = Field(description=CLASSIFIER_HELP)


class Ood(OneModel, WithModality, WithLabels, WithTraining):
    """Detect out-of-distribution samples with a frozen encoder or with a classifier.

    The samples of `--val` are in-distribution, and the samples of `--ood`, which need no labels, are
    out-of-distribution. For a frozen encoder, the logits are those of a logistic regression that is fitted to the
    training samples. Four scores are computed for each sample. They are higher for samples that look in-distribution:

    - `max_softmax`: highest softmax probability of the classes;
    - `energy`: logsumexp of the logits;
    - `knn`: minus the distance to the `knn.k`-th nearest training sample;
    - `mahalanobis`: minus the squared Mahalanobis distance to the nearest class mean of the training samples.

    These metrics are reported for each score:

    - `auroc`: area under the ROC curve, with its 95 % bootstrap interval. If the whole interval is below 0.5, the score
      is reported as inverted;
    - `aupr_in`, `aupr_out`: area under the precision-recall curve with in-distribution or out-of-distribution samples
      as positives. Unlike the other metrics, they depend on the ratio of the numbers of samples;
    - `fpr95`: fraction of out-of-distribution samples accepted at the threshold that accepts 95 % of the
      in-distribution samples.
    """

    uses = Uses(("encode", "knn"))
    LIBRARIES = ("sklearn",)

    model: Model = Field(description=f"{MODEL_HELP}; or {CLASSIFIER_HELP}")
    modality: Modality | None = None
    """input of the encoder (default: image, or the input of the classifier)"""
    ood: OutsideSets
    """out-of-distribution samples; for several sets, repeat the option with a different NAME for each set; in Python: a
    dict of shards by NAME"""

    @field_validator("ood")
    @classmethod
    def _has_own_names(cls, given: Mapping[str, Sequence[str]]) -> Mapping[str, Sequence[str]]:
        if taken := [name for name in given if name in ("train", "val")]:
            raise UserError(f"ood {taken[0]}: the result already uses this name for {taken[0]}; choose another name")
        return given

    @property
    def shards(self) -> list[str]:
        return [*super().shards, *(each for shards in self.ood.values() for each in shards)]


class Compare(WithLabels, WithTraining):
    """Compare models and baselines with several probes, and test which of them differ significantly."""

    uses = Uses(("encode", "knn", "attentive", *CROPS))

    model: Models = Field(
        description=f"{MODEL_HELP}; {FEATURES_HELP}. Without --train, --val and --out: the OUT folders of two or more "
        "tasks on the same samples"
    )
    probes: Annotated[Sequence[Probe], CommaList, Field(min_length=1), Option(metavar="NAME,NAME")] = PROBE_NAMES
    """probes to run (default: all)"""
    seeds: Annotated[int, Field(ge=1, le=100)] = 3
    """number of random seeds for the probes and for the randomly initialised model"""

    @property
    def uses_now(self) -> Uses:
        return Uses(("encode", *self.probes, *(CROPS if "attentive" in self.probes else ())))


TASKS: dict[str, type[Task]] = {
    task.name(): task for task in (Knn, Logistic, Linear, Attentive, Finetune, Segment, Robustness, Ood, Compare)
}


def named_task(name: str, **options: Any) -> Task:
    """Return a task with its options. Raises UserError if there is no such task, or if an option is invalid."""
    if name not in TASKS:
        raise UserError(f"{name}: no such task; choose from {', '.join(TASKS)}")
    return TASKS[name](**options)
