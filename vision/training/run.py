"""A run from settings to results: data, model, training, test, and a folder that shows all of it."""

from __future__ import annotations

import logging
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger

from ..data.loading import mix_seed, seed_everything
from ..data.module import SOURCES, ZooData
from ..data.splits import Splits
from .build import build_model
from .callbacks import EpochTable, LastCheckpoint, Progress, SignalWatch
from .checkpoints import AtomicCheckpointIO, load_checkpoint
from .config import Config
from .distillation import make_teacher
from .distributed import load_weights, make_environment, make_strategy
from .journal import Journal
from .launch import check_processes, is_first
from .mistakes import Mistakes
from .optimization import freeze
from .plan import make_plan
from .results import collect_results, describe_run, show_results
from .settings import ConfigError, nearest
from .summary import summarize
from .tasks import Task

_log = logging.getLogger(__name__)
_FOLDER_VARIABLE = "MIXERZOO_RUN_FOLDER"  # tells the processes that Lightning starts where the first one writes


def run(config: Config) -> dict[str, Any]:
    """Trains and tests as `config` says; returns what results.json holds. Raises `Interrupted` on SIGINT or SIGTERM."""
    with Journal() as journal:
        return _run(config, journal)


def _run(config: Config, journal: Journal) -> dict[str, Any]:
    started = time.monotonic()
    check_processes(config.train, config.out)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    splits = load_data(config)
    _log.info("data: %s (%d training, %d validation, %d test)", splits.origin, *map(len, _parts(splits)))
    plan = make_plan(config, len(splits.train))
    seed_everything(mix_seed(config.seed))
    model = build_model(config, splits)
    freeze(model, config.optim.freeze)
    summary = summarize(model, (splits.channels, splits.size, splits.size))
    _log.info(
        "model: %s, %.2f M parameters, %.3f GMACs", config.model.name, summary.parameters / 1e6, summary.macs / 1e9
    )
    _log.info(
        "plan: %d epochs of %d steps, %d pictures a step, highest learning rate %.3g",
        *(plan.epochs, plan.steps_per_epoch, plan.batch, config.optim.lr * plan.lr_factor),
    )
    task = Task(model, config, splits, plan=plan, teacher=make_teacher(config.distill, splits))
    folder = _make_folder(config)
    if is_first():
        journal.begin(folder, resumed=config.resume is not None)
        describe_run(folder, config, task, splits, summary)

    data = ZooData(
        splits,
        batch_size=config.train.batch_size,
        seed=config.seed,
        workers=config.data.workers,
        repeats=config.augment.repeats,
        sizes=config.augment.sizes,
    )
    with SignalWatch() as watch:
        trainer = _make_trainer(config, folder, watch, task)
        if config.train.compile:
            model.compile()
            task.objective.compile()
        trainer.fit(task, data, ckpt_path=config.resume, weights_only=True)
    best = load_checkpoint(folder / "checkpoints" / "best.ckpt")
    load_weights(task, best["state_dict"])
    mistakes = Mistakes(6 if splits.dense else 32)
    trainer.callbacks.append(mistakes)  # pyright: ignore[reportAttributeAccessIssue]
    [test] = trainer.test(task, data, verbose=False)

    results = collect_results(config, splits, summary, task, test, best)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["folder"] = str(folder)
    if trainer.is_global_zero:
        show_results(folder, task, splits, results, mistakes.found)
    return results


def load_data(config: Config) -> Splits:
    if config.data.source not in SOURCES:
        known = ", ".join(SOURCES)
        raise ConfigError(
            f"data.source={config.data.source}: choose one of {known}{nearest(config.data.source, list(SOURCES))}"
        )
    return SOURCES[config.data.source](config.data, config.augment, config.seed)


def _parts(splits: Splits) -> tuple[Any, Any, Any]:
    return splits.train, splits.val, splits.test


def _make_folder(config: Config) -> Path:
    """The run folder: given, resumed, or named by time. One with files in it needs `overwrite=true`."""
    if config.out is not None:
        folder = Path(config.out)
    elif not is_first() and _FOLDER_VARIABLE in os.environ:
        folder = Path(os.environ[_FOLDER_VARIABLE])
    else:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.name}-{config.data.name}"
        folder = Path("runs") / name.replace("/", "_")
    if not is_first():
        return folder
    os.environ[_FOLDER_VARIABLE] = str(folder)
    if config.resume is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not config.overwrite:
            raise ConfigError(f"out={folder} exists already; choose another, or overwrite=true, or resume={folder}")
        _remove_old_results(folder)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={folder} cannot be written: {error}") from error
    return folder


def _remove_old_results(folder: Path) -> None:
    """What a run writes and another run would take for its own; nothing else in the folder is touched."""
    pictures = [f"{name}.png" for name in ("batch", "curves", "predictions", "mistakes", "confusion")]
    for name in (
        "metrics.csv",
        "results.json",
        "env.json",
        "report.html",
        *pictures,
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
    ):
        (folder / name).unlink(missing_ok=True)


def _make_trainer(config: Config, folder: Path, watch: SignalWatch, task: Task) -> pl.Trainer:
    train = config.train
    best = ModelCheckpoint(
        folder / "checkpoints",
        filename="best",
        monitor=f"val/{task.metric}",
        mode="max",
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )
    last = LastCheckpoint(folder / "checkpoints" / "last.ckpt", watch, every=train.save_every)
    return pl.Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=make_strategy(train),
        precision=train.precision,
        max_epochs=task.plan.epochs,
        accumulate_grad_batches=task.plan.accumulate,
        gradient_clip_val=config.optim.clip_grad,
        limit_train_batches=train.limit_batches,
        limit_val_batches=train.limit_batches,
        limit_test_batches=train.limit_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=min(10, task.plan.steps_per_epoch),
        logger=[
            TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
            EpochTable(folder / "metrics.csv", resume=config.resume is not None),
        ],
        callbacks=[best, last, *([Progress(refresh_rate=10)] if train.progress else [])],
        plugins=[AtomicCheckpointIO(), make_environment()],
        use_distributed_sampler=False,  # ours shards by itself, without repeating pictures
        enable_model_summary=False,
        enable_progress_bar=train.progress,
    )
