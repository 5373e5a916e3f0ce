"""The dry run: model size, FLOPs, batch split, memory, loader cores and communication of a config, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from m3ae_fast.base.hardware import PEAKS, missing_memory, resolve_precision
from m3ae_fast.base.progress import working
from m3ae_fast.base.wording import counted
from m3ae_fast.config import Config
from m3ae_fast.data import Corpus, open_data, split_batch
from m3ae_fast.data.prefetch_schedule import PrefetchSchedule
from m3ae_fast.engine.memory_estimate import (
    activation_bytes,
    caption_tokens,
    in_bf16,
    matrix_elements,
    memory_needed,
    muon_bytes,
    peak_bytes,
    recomputes,
    still_gathered,
    typical_batch,
    zero_bytes,
)
from m3ae_fast.engine.schedule import Schedule
from m3ae_fast.model.flops import executed_flops, reference_flops
from m3ae_fast.model.m3ae import M3AE
from m3ae_fast.process.session import Session
from m3ae_fast.training.diagnostics import WAITING, faster_loading
from m3ae_fast.training.teacher import Teacher
from m3ae_fast.training.throughput import newton_schulz_flops
from m3ae_fast.training.throughput_estimate import FIRST_BATCH, measure

RANKS_OF_NODE = 8  # assumed number of ranks per node
MEASURED_S = 5.0  # seconds for measuring steps, from which the duration of the run is estimated; see `measure`
# JPEGs of 500 x 400 pixels that the loader prepares per second and core, at 256 px. This was measured on one core of an
# Intel Xeon (Emerald Rapids), the slowest machine in benchmarks/results; Zen 4 and Zen 5 each prepared 677.
DECODED_PER_CORE = 514


def report(
    config: Config,
    world: int | None = None,
    *,
    gpus: bool = True,
    data: bool = True,
    more: Sequence[tuple[str, str]] = (),
    teacher: Teacher | None = None,
) -> None:
    """Print the resources that a run with `config` requires.

    Args:
        config: config of the run; if `gpus` is False, its precision must be resolved. If the run has a teacher, its
            `model.target_width` must be known.
        world: number of GPUs, or number of ranks if there are no GPUs; None: `train.global_batch` divided by
            `train.micro_batch` and rounded down, but at least 1.
        gpus: whether to also print the FLOPs, the network traffic and the memory per GPU, and the shortest possible
            step on each kind of GPU in `PEAKS`; otherwise, only the lines that matter without GPUs are printed.
        data: whether to open the shards and the tokenizer.
        more: additional lines to print at the end, each as a title and a text.
        teacher: the teacher of the run; None if there is none, or if it has not been opened.

    Raises:
        UserError: a run could not start, because the batch cannot be split over the ranks, or because shards or the
            tokenizer are missing or do not fit the model.
    """
    needs = _Needs(config, world)
    lines = [*_flops_lines(needs), _batch_line(needs, gpus)]
    if teacher:
        of_pass = teacher.pass_bytes(needs.share.micro_batch, needs.share.accumulation)
        own = f"{teacher.bytes / 1e9:.3g} GB for its weights and about {of_pass / 1e9:.3g} GB for its passes"
        text = f"{teacher.describe(config)}; memory per rank in addition to the estimate below: {own}"
        lines.append(("teacher", text))
    if gpus:
        lines += [("step", _step(needs)), ("network", _network(needs))]
    if data:
        lines += _data_lines(needs)
    if not gpus:
        stage = config.zero.stage if config.zero else 0
        state = zero_bytes(needs.parameters, stage, needs.world, in_bf16(config), needs.matrices)
        memory = peak_bytes(sum(state), needs.activations, needs.matrices, stage, needs.world)
        lines.append(("memory", f"{memory / 1e9:,.3g} GB per rank (estimated)"))
    if not (gpus or data):
        hint = "to plan a run on N GPUs of another machine, use --world N"
        lines.append(("time", f"not measured, because no data is read; {hint}"))
    console = Console(highlight=False, soft_wrap=True)
    for name, text in [*lines, *more]:
        console.print(f"{name:21} {text}")
    if gpus:
        console.print(shortest_steps(needs.step_flops, needs.samples, needs.world))
        sheet = "shortest step: FLOPs divided by the peak in the GPU's data sheet for dense matmuls in bf16"
        console.print(f"{sheet}; this is a lower limit, not a prediction")
        speed = f"{DECODED_PER_CORE} images per second and core, measured with images of 500 x 400 pixels at 256 px"
        console.print(f"cores: the most that the loader can need, for steps of this length and {speed}")
        _print_memory(console, needs)


class _Needs:
    """The FLOPs and the memory that follow from a config."""

    def __init__(self, config: Config, world: int | None) -> None:
        """Compute these values. The arguments and errors are the same as in `report`."""
        with torch.device("meta"):
            self.model = M3AE(config.model, config.loss)
        self.config = config
        self.parameters = sum(p.numel() for p in self.model.parameters())
        sample = typical_batch(config, self.model)
        one_step = config.train.global_batch // (config.train.micro_batch or config.train.global_batch)
        self.world = world or max(one_step, 1)
        self.share = split_batch(config.train, self.world)
        self.flops = executed_flops(config.model, sample)  # per sample
        self.samples = config.train.global_batch / self.world  # mean number of samples per step and rank
        self.muon_flops = newton_schulz_flops(config, self.model, self.world)  # per step and rank
        self.step_flops = self.samples * self.flops + self.muon_flops  # per step and rank
        self.activations = self.share.micro_batch * activation_bytes(config, sample)  # bytes per rank
        self.matrices = matrix_elements(config, self.model)


def _flops_lines(needs: _Needs) -> list[tuple[str, str]]:
    config = needs.config
    official = reference_flops(config.model, config.masking)
    square = ", for a square image" if config.model.resize == "native" else ""
    return [
        ("parameters", f"{needs.parameters:,}"),
        ("FLOPs per sample", f"{official / 1e9:,.1f} G forward and backward in the official code{square}"),
        ("", f"{needs.flops / 1e9:,.1f} G in this engine, for a caption of {caption_tokens(config)} tokens"),
    ]


def _batch_line(needs: _Needs, gpus: bool) -> tuple[str, str]:
    train, world = needs.config.train, needs.world
    micro, accumulation = needs.share.micro_batch, needs.share.accumulation
    unit = "GPUs" if gpus else "rank" if world == 1 else "ranks"
    most = "" if micro * world * accumulation == train.global_batch else "at most "
    batches = "1 micro-batch" if accumulation == 1 else f"{accumulation} micro-batches"
    text = f"{train.global_batch} = {world} {unit} x {most}{micro} samples x {batches}"
    if micro != (train.micro_batch or micro):
        text += " (train.micro_batch is a maximum)"
    return "batch", text


def _data_lines(needs: _Needs) -> list[tuple[str, str]]:
    """Open the data, and return lines about the data and the number of steps."""
    config = needs.config
    with working("opening the data"):
        found = open_data(config.data, config.model, progress=True)
    schedule = Schedule(config.train, config.optim, found.train.samples * config.data.repeats)
    held_out = f", {found.val.samples:,} held out" if found.val else ""
    text = f"{found.train.samples:,} samples{held_out}; {schedule.total_steps:,} steps"
    return [("data", text), *fetching_lines(config, found.train, needs.world)]


def _print_memory(console: Console, needs: _Needs) -> None:
    """Print the memory per GPU for each ZeRO stage."""
    console.print(memory_table(needs.config, needs.parameters, needs.world, needs.activations, needs.matrices))
    console.print("activations: an estimate of the tensors that autograd saves for each block, in the run's precision")
    if needs.matrices:
        first, others = (muon_bytes(needs.matrices, stage, needs.world) / 1e9 for stage in (0, 1))
        console.print(
            f"Muon: after the activations have been freed, an update needs {first:.2f} GB at stage 0 and {others:.2f} "
            "GB at stages 1 and 2; the sum includes the activations or the update, whichever is larger"
        )
    if recomputes(needs.config.train):
        mlp_ratio = needs.config.model.mlp_ratio
        fraction = (6 + mlp_ratio) / (8 + 2 * mlp_ratio)
        console.print(
            f"on a GPU without enough memory for all activations, {fraction:.0%} are kept, and the outputs of GELU and "
            "LayerNorm are recomputed"
        )


def report_time(config: Config, session: Session, teacher: Teacher | None = None) -> None:
    """Print the duration of the run on the present ranks, estimated from measured steps; the number of cores that the
    data loader needs at this pace; and, if the loader is the bottleneck, how to make it faster. Every rank must call
    this function. `config`, `teacher`: as in `report`. Raises the same errors as `measure`."""
    ranks = session.ranks
    needed = memory_needed(config, ranks.world, FIRST_BATCH)
    if teacher:
        needed += teacher.bytes + teacher.pass_bytes(FIRST_BATCH)
    if lacking := ranks.from_main(missing_memory(needed, ranks.device)):
        if ranks.is_main:
            print(f"{'time':21} not measured on this machine: {lacking}")
        return
    resolved = config.model_copy(update={"train": resolve_precision(config.train, ranks.device)})
    pace = measure(resolved, session, MEASURED_S)
    if ranks.is_main:
        found = open_data(config.data, config.model)
        schedule = Schedule(config.train, config.optim, found.train.samples * config.data.repeats)
        batch = config.train.global_batch
        cores = batch / pace.step(batch) / DECODED_PER_CORE
        lines = [
            ("time", pace.sentence(config, schedule)),
            ("loader", f"{cores:,.2g} cores, for {pace.rate(batch)}"),
        ]
        if pace.data_wait > WAITING:
            text = f"{pace.data_wait:.0%} of the measured time: the loader is the bottleneck on this machine; "
            lines.append(("data wait", f"{text}suggested fix: {faster_loading(config.data.repeats)}"))
        for name, text in lines:
            print(f"{name:21} {text}", flush=True)


def network_bytes(
    parameters: int, stage: int | None, world: int, accumulation: int, bf16: bool, fp32_sums: bool, matrices: int = 0
) -> int:
    """Return the bytes that a GPU sends per optimiser step. `stage`: ZeRO stage, or None for DDP; `world`: number of
    GPUs; `accumulation`: micro-batches per step; `bf16`: whether matmuls run in bf16; `fp32_sums`: whether gradients
    are reduced in float32; `matrices`: number of weights that Muon updates.

    An all-reduce over n GPUs sends 2 (n - 1) / n of its data, and a reduce-scatter or an all-gather sends half of that.
    Gradients are sent once per step, or once per micro-batch in stages 2 and 3, in which each GPU keeps only its
    partition of them. In stages 1 and 2, DeepSpeed reduces gradients by all-reduce. After the step, weights are
    gathered once, and so are Muon's updates, in float32. In stage 3, weights are gathered for every forward pass, and
    again for the backward pass unless they remain gathered.
    """
    half = parameters * (world - 1) / world
    weights = (2 if bf16 and stage else 4) * half
    gradients = (4 if fp32_sums else 2) * half
    if not stage:
        return round(2 * gradients)
    if stage < 3:
        return round(2 * gradients * (accumulation if stage == 2 else 1) + weights + exchanged_updates(matrices, world))
    return round((gradients + weights * (2 - still_gathered(parameters) / parameters)) * accumulation)


def exchanged_updates(matrices: int, world: int) -> float:
    """Return the bytes that each GPU sends per step to exchange Muon's updates with ZeRO stage 1 or 2. `matrices`:
    number of weights that Muon updates; `world`: number of GPUs."""
    return 4 * matrices * (world - 1) / world


def _step(needs: _Needs) -> str:
    """Return a description of the FLOPs of a step, including those of Muon."""
    text, samples = f"{_rounded(needs.step_flops / 1e12)} TFLOP per GPU", f"for {_rounded(needs.samples)} samples"
    if not needs.muon_flops:
        return f"{text}, {samples}"
    parts = needs.samples * needs.flops, needs.muon_flops
    forward, muon = (_rounded(flops / 1e12) for flops in parts)
    return f"{text}: {forward} {samples}, and {muon} for Muon's Newton-Schulz iterations"


def _network(needs: _Needs) -> str:
    config = needs.config
    stage = None if config.zero is None else config.zero.stage
    fp32_sums = config.deepspeed is None or config.deepspeed.communication_data_type == "fp32"
    world, accumulation = needs.world, needs.share.accumulation
    sent = network_bytes(needs.parameters, stage, world, accumulation, in_bf16(config), fp32_sums, needs.matrices)
    text = f"{sent / 1e9:,.2f} GB sent per GPU in each step"
    if stage in (1, 2) and needs.matrices and sent:
        text += f", of which {exchanged_updates(needs.matrices, world) / 1e9:,.2f} GB are Muon's updates"
    return text


def fetching_lines(config: Config, corpus: Corpus, world: int) -> list[tuple[str, str]]:
    """Return lines about the downloads and the cached shards of a node, each as a title and a text. The result is empty
    if shards are read in place or their sizes are unknown."""
    ranks = range(min(world, RANKS_OF_NODE))
    schedule = PrefetchSchedule.of_config(config.data, corpus, config.train.global_batch, world, ranks, config.run.seed)
    first, owned = schedule.in_use() / 1e9, schedule.owned() / 1e9
    if not owned:
        return []
    node = f"a node with {counted(len(ranks), 'rank')}"
    return [
        ("fetching", f"at most {first:,.3g} GB for {node} before the first step, and {owned:,.3g} GB in an epoch"),
        ("disk of a node", f"at least {2 * first:,.3g} GB for cached shards; {owned:,.3g} GB to cache all shards"),
    ]


def shortest_steps(flops: float, samples: float, world: int) -> Table:
    """Return a table of the shortest possible step on each kind of GPU, and of the number of CPU cores with which the
    loader keeps up with such steps, for one GPU and for `world` GPUs. `flops`, `samples`: FLOPs and samples per step
    and GPU; `world`: number of GPUs."""
    gpus = [1] if world == 1 else [1, world]
    columns = [f"cores for {counted(count, 'GPU')}" for count in gpus]
    table = Table("GPU", "peak TFLOP/s", "shortest step in ms", *columns)
    for name, peaks in PEAKS.items():
        seconds = flops / peaks.flops
        cores = (f"{math.ceil(count * samples / seconds / DECODED_PER_CORE):,}" for count in gpus)
        table.add_row(name, f"{peaks.flops / 1e12:,.0f}", _rounded(1e3 * seconds), *cores)
    return table


def _rounded(value: float) -> str:
    """Return a number with three significant digits, without an exponent if it is from 0.0001 to below 1e10."""
    return f"{float(f'{value:.3g}'):,.10g}"


def memory_table(config: Config, parameters: int, world: int, activations: float, matrices: int = 0) -> Table:
    """Return a table of the memory per GPU in GB for each ZeRO stage. `activations`: their bytes per GPU; `matrices`:
    number of weights that Muon updates; if there are any, stage 3 is left out, because Muon cannot be used with it."""
    adam = "Muon and Adam" if matrices else "Adam"
    table = Table("ZeRO stage", "weights", "gradients", f"master + {adam}", "activations", "GB per GPU")
    for stage in range(3 if matrices else 4):
        state = zero_bytes(parameters, stage, world, in_bf16(config), matrices)
        whole = peak_bytes(sum(state), activations, matrices, stage, world)
        mark = " (this config)" if config.zero is not None and stage == config.zero.stage else ""
        table.add_row(f"{stage}{mark}", *(f"{part / 1e9:.2f}" for part in (*state, activations, whole)))
    return table
