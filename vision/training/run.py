"""Run training and test from the settings: build data and model, train, test, and write the run folder."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from .._messages import did_you_mean
from ..data.loading import mix_seed, seed_everything
from ..data.module import SOURCES, ZooData
from ..data.splits import Splits
from ..summary import summarize
from .build import build_model, check_before_data, checkpoint_gradients
from .callbacks import BestCheckpoint, Curves, EpochTable, LastCheckpoint, Progress
from .checkpoints import AtomicCheckpointIO, load_best
from .config import Config
from .distillation import make_teacher
from .distributed import load_weights, make_environment, make_strategy, on_gpu, whole
from .failures import disk_advice, memory_advice
from .folder import make_folder
from .journal import Journal
from .launch import check_processes, is_first
from .mistakes import Mistakes
from .optimization import freeze
from .plan import make_plan
from .results import collect_results, describe_run, show_results
from .resume import BEST, LAST, first_whole
from .settings import ConfigError
from .signals import SignalWatch
from .tasks import Task

_log = logging.getLogger(__name__)


def run(config: Config) -> dict[str, Any]:
    """Train and test; return the content of results.json. Raises `Interrupted` on SIGINT, SIGTERM or SIGUSR1."""
    with Journal() as journal, memory_advice(config), disk_advice(config):
        return _run(config, journal)


def _run(config: Config, journal: Journal) -> dict[str, Any]:
    started = time.monotonic()
    check_processes(config.train, config.out)
    check_before_data(config)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    splits = load_data(config)
    _log.info("data: %s (%d training, %d validation, %d test)", splits.origin, *map(len, _parts(splits)))
    plan = make_plan(config, len(splits.train))
    seed_everything(mix_seed(config.seed))
    model = build_model(config, splits)
    freeze(model, config.optim.freeze)
    if config.train.grad_checkpointing:
        checkpoint_gradients(model, config.model.name)
    summary = summarize(model, (splits.channels, splits.size, splits.size))
    _log.info(
        "model: %s, %.2f M parameters, %.3f GMACs", config.model.name, summary.parameters / 1e6, summary.macs / 1e9
    )
    _log.info(
        "plan: %d epochs of %d steps, %d pictures a step, highest learning rate %.3g",
        *(plan.epochs, plan.steps_per_epoch, plan.batch, config.optim.lr * plan.lr_factor),
    )
    task = Task(
        model, config, splits, plan=plan, teacher=make_teacher(config.distill, splits, config.augment.sizes.values())
    )
    data = _make_data(config, splits)
    folder = make_folder(config)
    checkpoint = None if config.resume in (None, "auto") else first_whole(Path(config.resume))
    if is_first():
        journal.begin(folder, resumed=checkpoint is not None, metric=task.metric)
        describe_run(folder, config, task, data, summary)

    with SignalWatch() as watch:
        trainer = _make_trainer(config, folder, watch, task, resumed=checkpoint is not None)
        if config.train.compile:
            task.compile_network()
        trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
        best = load_best(folder / "checkpoints" / BEST)
        load_weights(task, best["state_dict"])
        mistakes = Mistakes(6 if splits.dense else 32)
        trainer.callbacks.append(mistakes)  # pyright: ignore[reportAttributeAccessIssue]
        [test] = trainer.test(task, data, verbose=False)

    results = collect_results(config, splits, summary, task, test, best)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["folder"] = str(folder)
    if trainer.is_global_zero:
        task.model = whole(task.model, lambda: _build_empty(config, splits), best["state_dict"])
        show_results(folder, task, splits, results, mistakes.found)
    return results


def _build_empty(config: Config, splits: Splits) -> torch.nn.Module:
    """Build the model of a run without loading the initial weights."""
    fresh = dataclasses.replace(config.model, pretrained=False, checkpoint=None, start_from=None)
    return build_model(dataclasses.replace(config, model=fresh), splits)


def load_data(config: Config) -> Splits:
    if config.data.source not in SOURCES:
        known = ", ".join(SOURCES)
        raise ConfigError(
            f"data.source={config.data.source}: choose one of {known}{did_you_mean(config.data.source, SOURCES)}"
        )
    return SOURCES[config.data.source](config.data, config.augment, config.seed)


def _make_data(config: Config, splits: Splits) -> ZooData:
    return ZooData(
        splits,
        batch_size=config.train.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        repeats=config.augment.repeats,
        sizes=config.augment.sizes,
        timeout=config.data.timeout,
        restarts=config.data.worker_restarts,
    )


def _parts(splits: Splits) -> tuple[Any, Any, Any]:
    return splits.train, splits.val, splits.test


def _make_trainer(config: Config, folder: Path, watch: SignalWatch, task: Task, *, resumed: bool) -> pl.Trainer:
    train = config.train
    best = BestCheckpoint(folder / "checkpoints", task.metric)
    last = LastCheckpoint(folder / "checkpoints" / LAST, watch, every=train.save_every)
    return pl.Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=make_strategy(train),
        sync_batchnorm=train.sync_batchnorm and on_gpu(train),
        precision=train.precision,
        max_epochs=task.plan.epochs,
        accumulate_grad_batches=task.plan.accumulate,
        gradient_clip_val=config.optim.clip_grad,
        limit_train_batches=train.limit_batches,
        limit_val_batches=train.limit_batches,
        limit_test_batches=train.limit_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, task.plan.steps_per_epoch),
        default_root_dir=folder,
        logger=[
            Curves(folder, name="", version="tensorboard", default_hp_metric=False),
            EpochTable(folder / "metrics.csv", resume=resumed),
        ],
        callbacks=[best, last, *([Progress(refresh_rate=10)] if train.progress else [])],
        plugins=[AtomicCheckpointIO(on_error=train.save_errors), make_environment()],
        use_distributed_sampler=False,  # our batch sampler shards without repeating pictures
        enable_model_summary=False,
        enable_progress_bar=train.progress,
    )
