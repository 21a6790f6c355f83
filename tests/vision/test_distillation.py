"""Distillation losses against the official ones, the teacher, EViT's keep rate schedule, and runs that use them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from mixerzoo.vision.data.splits import Splits
from mixerzoo.vision.training import distillation
from mixerzoo.vision.training import run as run_module
from mixerzoo.vision.training.build import build_model
from mixerzoo.vision.training.callbacks import KeepRateWarmup, read_table
from mixerzoo.vision.training.checkpoints import load_checkpoint
from mixerzoo.vision.training.distillation import (
    Objective,
    Teacher,
    logits_loss,
    make_teacher,
    ratio_loss,
    tokens_loss,
)
from mixerzoo.vision.training.optimization import freeze, hold_back, make_optimizer, make_scheduler, parameter_groups
from mixerzoo.vision.training.plan import make_plan
from mixerzoo.vision.training.run import run
from mixerzoo.vision.training.settings import ConfigError, load
from mixerzoo.vision.training.tasks import make_keep_rate_warmup
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

VIT = (
    "model.kwargs={img_size: 16, patch_size: 4, embed_dim: 24, depth: 4, num_heads: 2}",
    *("data=digits", "data.size=16", "data.limit=160", "train.batch_size=32", "train.progress=false"),
    *("augment.shift=0", "schedule.warmup_epochs=0", "train.epochs=2"),
)
"""Five steps per epoch of a ViT with 16 patches; the test adds the name of the model."""


class Decided(NamedTuple):
    logits: Tensor
    tokens: Tensor
    decisions: list[Tensor]
    mask: Tensor | None


class Deciding(nn.Module):
    """A minimal model that decides on tokens: sixteen patches, two stages, straight-through thresholds."""

    target_keep_rates = (0.5, 0.25)

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 24, 4, 4)
        self.score = nn.Linear(24, 2)
        self.head = nn.Linear(24, classes)

    def forward_intermediates(self, x: Tensor, indices: int, norm: bool) -> tuple[Tensor, list[Tensor]]:
        x = self.embed(x)
        return x, [x]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.embed(x))

    def forward_decided(self, x: Tensor) -> Decided:
        x = self.embed(x)
        tokens = x.flatten(2).transpose(1, 2)
        soft = self.score(tokens).sigmoid()
        hard = ((soft > 0.5).float() - soft).detach() + soft
        decisions = [hard[..., 0], hard[..., 0] * hard[..., 1]]
        return Decided(self.forward_head(x), tokens, decisions, decisions[-1])


def _normal(name: str, *shape: int) -> Tensor:
    stream = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    return torch.from_numpy(stream.standard_normal(shape)).float()


@pytest.fixture
def configs(repository: Path) -> Path:
    return repository / "configs"


@pytest.fixture(scope="module")
def recorded(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "tests" / "goldens" / "token_ops.json").read_text())


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_losses_are_those_of_dynamicvit(distance: Any, recorded: dict[str, Any]) -> None:
    want = recorded["dynamicvit"]["loss"]["values"][distance]
    student, teacher = _normal("dl.s_cls", 4, 10), _normal("dl.t_cls", 4, 10)
    decisions = [(_normal(f"dl.dec{i}", 4, 20) > limit).float() for i, limit in enumerate((-0.5, 0, 0.4))]
    labels = F.cross_entropy(student, _normal("dl.target", 4, 10).softmax(-1))
    ratio = ratio_loss(decisions, [0.7, 0.49, 0.343])
    logits = logits_loss(student, teacher)
    tokens = tokens_loss(_normal("dl.s_tok", 4, 20, 8), _normal("dl.t_tok", 4, 20, 8), decisions[-1], distance=distance)
    assert float(labels) == pytest.approx(want["cls"], rel=1e-6)
    assert float(ratio) * 3 == pytest.approx(want["ratio"], rel=1e-5)  # theirs is the sum over stages, divided later
    assert float(logits) == pytest.approx(want["cls_kl"], rel=1e-6)
    assert float(tokens) == pytest.approx(want["token"], rel=1e-6)
    assert float(labels + 2.0 * ratio + 0.5 * logits + 0.5 * tokens) == pytest.approx(want["loss"], rel=1e-6)


def test_what_the_losses_are_differentiable_in() -> None:
    student, teacher = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 4)
    mask = torch.tensor([[1.0, 0, 1, 0, 0, 0], [0.0] * 6], requires_grad=True)
    tokens_loss(student, teacher, mask).backward()
    assert student.grad is not None and mask.grad is None
    assert (student.grad.abs().sum(-1) > 0).float().equal(mask.detach())
    assert tokens_loss(student, teacher, torch.zeros(2, 6)) == 0
    torch.testing.assert_close(tokens_loss(student, teacher), F.mse_loss(student, teacher))
    ratio_loss([mask], [0.5]).backward()
    assert mask.grad is not None and mask.grad[0].unique().numel() == 1
    with pytest.raises(ValueError, match="1 decisions need as many keep rates; got 2"):
        ratio_loss([mask], [0.5, 0.4])


def test_halves_lose_nothing_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(2, 3).bfloat16() * 30, torch.randn(2, 3).bfloat16() * 30
    assert logits_loss(student, teacher) == logits_loss(student.float(), teacher.float())
    assert tokens_loss(student[None], teacher[None]).dtype == torch.float32


def _splits(classes: int = 10, *, size: int = 16, dense: bool = False, channels: int = 1) -> Splits:
    names = tuple(str(index) for index in range(classes))
    unread: Any = ("pictures",)
    stats = ((0.5,) * channels, (0.25,) * channels)
    return Splits(unread, unread, unread, names, *stats, size, "nowhere", dense)


def test_a_teacher_sees_pictures_as_it_learned_them() -> None:
    """A picture normalised for the student gives the same answer as one normalised for the teacher."""
    teacher = Teacher(nn.Flatten(), _splits(), normalised_for=([0.2], [0.4]))
    pictures = torch.rand(3, 1, 2, 2)
    seen, tokens = teacher((pictures - 0.5) / 0.25)
    assert tokens is None
    torch.testing.assert_close(seen, ((pictures - 0.2) / 0.4).flatten(1))
    same = Teacher(nn.Identity(), _splits(), normalised_for=([0.5], [0.25]))
    assert same(pictures)[0] is pictures


def test_a_teacher_is_frozen_and_answers_with_its_normed_tokens() -> None:
    model = timm.create_model("test_vit", img_size=16, num_classes=10, in_chans=1, drop_path_rate=0.5)
    teacher = Teacher(model, _splits())
    pictures = torch.randn(2, 1, 16, 16)
    logits, tokens = teacher(pictures, tokens=True)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert not logits.requires_grad and not logits.is_inference() and tokens is not None
    torch.testing.assert_close(tokens, model.forward_features(pictures)[:, 1:])
    torch.testing.assert_close(logits, model(pictures))


@pytest.mark.parametrize("name", ["test_convnext", "test_mambaout", "nat_mini", "vim_tiny", "test_efficientnet"])
def test_every_kind_of_model_can_be_taught(name: str, configs: Path) -> None:
    """With the teacher as its own student, the tokens have the same shape and both losses are zero."""
    config = load(["data=digits", f"model={name}", "distill.teacher=x", "distill.tokens_weight=1"], configs)
    kwargs = {"depth": 2} if name == "vim_tiny" else {"depths": (1, 1, 1, 1), "embed_dim": 16} if "nat" in name else {}
    model = timm.create_model(name, num_classes=10, in_chans=1, **kwargs).eval()
    objective = Objective(model, config, _splits(size=64), Teacher(model, _splits(size=64)))
    logits, parts = objective(torch.randn(2, 1, 64, 64))
    assert logits.shape == (2, 10) and parts.keys() == {"logits", "tokens"}
    assert parts["logits"].abs() < 1e-6 and parts["tokens"] == 0


def test_the_parts_of_the_objective(configs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(["data=digits", "model=x", "distill.teacher=t", "distill.tokens_weight=0.5"], configs)
    student = Deciding()
    teacher = Teacher(Deciding(), _splits())
    objective = Objective(student, config, _splits(), teacher)
    assert objective.weights == {"ratio": 2.0, "logits": 0.5, "tokens": 0.5}
    pictures = torch.randn(3, 1, 16, 16)
    logits, parts = objective(pictures)
    decided = student.forward_decided(pictures)
    wanted, wanted_tokens = teacher(pictures, tokens=True)
    assert wanted_tokens is not None and torch.equal(logits, decided.logits)
    assert parts["ratio"] == ratio_loss(decided.decisions, [0.5, 0.25])
    assert parts["logits"] == logits_loss(logits, wanted)
    assert parts["tokens"] == tokens_loss(decided.tokens, wanted_tokens, decided.mask)
    sum(parts.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert all(parameter.grad is not None for parameter in student.parameters())
    without = Objective(student, load(["data=digits", "reduction.ratio_weight=0"], configs), _splits())
    assert without.weights == {} and without(pictures)[1] == {}


TEACHER = "distill.teacher=test_vit"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reduction.ratio_weight=2"], "but test_vit decides on no tokens (DynamicViT does); set it to null"),
        (["distill.tokens_weight=0.5"], "needs a teacher; give distill.teacher=MODEL"),
        (["distill.checkpoint=x.pth"], "belong to a teacher; give distill.teacher=MODEL"),
        (["distill.labels_weight=0"], "there is nothing to learn"),
        (["distill.teacher=test_vitt"], "did you mean test_vit"),
        ([TEACHER, "distill.checkpoint=nowhere.pth"], "distill.checkpoint=nowhere.pth: there is no such file"),
        ([TEACHER, "distill.kwargs={colour: 3}"], "the published weights of test_vit are not on this machine"),
        (["reduction.shrink_epochs=2"], "test_vit has no keep rate that can fall while it trains (EViT and EET have)"),
        (["reduction.shrink_start_epoch=2"], "give shrink_epochs"),
        (["model.start_from=nowhere.ckpt"], "no model is called 'nowhere.ckpt'; a file, or a timm model, is needed"),
        (
            ["model.start_from=test_vit", "model.pretrained=true"],
            "model.pretrained and model.checkpoint name weights too; give one",
        ),
        (["optim.freeze=[hed.*]"], "optim.freeze: no parameter is called hed.*"),
        (['optim.freeze=["*"]'], "leaves no parameter that could learn"),
        (["optim.freeze_epochs={hed: 1}"], "optim.freeze_epochs: no parameter is called hed"),
        (["optim.freeze_epochs={cls_token: -1}"], "needs a finite number, at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    arguments: list[str], message: str, configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: None)
    out = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        run(load([*VIT[1:], "model=test_vit", "model.kwargs={img_size: 16}", f"out={out}", *arguments], configs))
    assert message in str(caught.value)
    assert not (out / "metrics.csv").exists()


def _saved(path: Path, **changes: Any) -> Path:
    """Write a checkpoint of train.py with a test_vit on digits."""
    kwargs = {"img_size": 16}
    facts = {"model": "test_vit", "model_kwargs": kwargs, "head": None, "classes": list("0123456789"), "in_chans": 1}
    facts |= {"size": 16, "mean": [0.3], "std": [0.4], **changes}
    model = timm.create_model("test_vit", num_classes=len(facts["classes"]), in_chans=facts["in_chans"], **kwargs)
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "mixerzoo": facts}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"classes": list("012")}, 16, "knows 3 classes, but the data has 10; train it on this data first"),
        ({"classes": list("0123456798")}, 16, "class 8 is 9 to the teacher and 8 in the data"),
        ({"in_chans": 3}, 16, "cannot take pictures of 1 x 16 x 16"),
        ({"model": "test_convnext"}, 16, "holds a test_convnext, not a test_vit"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(
    changes: dict[str, Any], size: int, message: str, configs: Path, tmp_path: Path
) -> None:
    path = _saved(tmp_path / "teacher.ckpt", **changes)
    distill = load([TEACHER, f"distill.checkpoint={path}"], configs).distill
    with pytest.raises(ConfigError) as caught:
        make_teacher(distill, _splits(size=size))
    assert message in str(caught.value)


def test_a_teacher_of_another_grid_or_for_masks_is_refused(configs: Path, tmp_path: Path) -> None:
    path = _saved(tmp_path / "teacher.ckpt")
    config = load([TEACHER, f"distill.checkpoint={path}", "distill.tokens_weight=1", "model=test_vit2"], configs)
    teacher = make_teacher(config.distill, _splits())
    model = timm.create_model("test_vit", img_size=16, patch_size=8, in_chans=1, num_classes=10)
    with pytest.raises(ConfigError, match="test_vit2 ends with 4 tokens of width 64, its teacher test_vit with 1 of"):
        Objective(model, config, _splits(), teacher)
    with pytest.raises(ConfigError, match="teachers are classifiers; set it to null for segmentation"):
        make_teacher(config.distill, _splits(dense=True))


def test_weights_of_another_model_are_the_start(configs: Path, tmp_path: Path) -> None:
    """All tensors of the checkpoint are loaded, missing ones stay new, and other architectures are rejected."""
    path = _saved(tmp_path / "dense.ckpt")
    start = [*VIT[1:], f"model.start_from={path}"]
    small = "{img_size: 16, patch_size: 16, embed_dim: 64, depth: 6, num_heads: 2, mlp_ratio: 3}"
    config = load([*start, "model=evit_deit_small_patch16_224", f"model.kwargs={small}"], configs)
    model = build_model(config, _splits())
    state = torch.load(path, weights_only=True)["state_dict"]
    assert model.state_dict().keys() == {name.removeprefix("model.") for name in state}
    assert all(torch.equal(value, state[f"model.{name}"]) for name, value in model.state_dict().items())
    three = build_model(load([*start, "model=test_vit", "model.kwargs={img_size: 16}"], configs), _splits(3))
    assert torch.equal(three.state_dict()["cls_token"], state["model.cls_token"])
    with pytest.raises(ConfigError, match=r"and the weights of \S+dense.ckpt: .{1,200}$"):
        build_model(load([*start, "model=test_convnext"], configs), _splits())
    with pytest.raises(ConfigError, match="of its tensors have no counterpart in test_resnet, as "):
        build_model(load([*start, "model=test_resnet"], configs), _splits(3))


def test_the_keep_rate_falls_as_evits(recorded: dict[str, Any]) -> None:
    warmup = KeepRateWarmup(lambda _: None, [0.7, 1.0], start_epoch=10, epochs=100, steps_per_epoch=100)
    values = recorded["evit"]["adjust_keep_rate"]
    assert len(values) == 9
    for value in values:
        assert warmup.rates_at(value["it"]) == pytest.approx([value["out"], 1.0], rel=1e-12)


def test_frozen_parameters_are_in_no_group(configs: Path) -> None:
    model = timm.create_model("test_vit")
    freeze(model, ["cls_token", "blocks.0.*"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"cls_token"} | {n for n, _ in model.named_parameters() if n.startswith("blocks.0.")}
    groups = parameter_groups(model, weight_decay=0.1, layer_decay=None, lr_scale={"*": 0.5})
    members = {id(parameter) for group in groups for parameter in group["params"]}
    assert members == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_the_last_pattern_says_when_learning_begins(configs: Path) -> None:
    arguments = ['optim.freeze_epochs={"*": 2, "head.*": 0, "blocks.1.*": 0.5}', "optim.lr_scale={blocks.*: 0.1}"]
    config = load([*arguments, "schedule.warmup_epochs=0", "train.batch_size=250", "train.epochs=4"], configs)
    plan = make_plan(config, 1000)
    model = timm.create_model("test_vit")
    optimizer = make_optimizer(model, config.optim, plan)
    scheduler = make_scheduler(optimizer, config.schedule, plan)
    begun: dict[str, int] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for step in range(13):
        scheduler.step_update(step)
        usual = [group["lr"] for group in optimizer.param_groups]
        hold_back(optimizer, step, plan.steps_per_epoch)
        for group, rate in zip(optimizer.param_groups, usual, strict=True):
            assert group["lr"] in (0, rate)
            begun |= {names[p]: step for p in group["params"] if group["lr"] > 0 and names[p] not in begun}
    want = {name: 0 if name.startswith("head.") else 2 if name.startswith("blocks.1.") else 8 for name in begun}
    assert begun == want and len(begun) == len(names)


def _run(configs: Path, *arguments: str) -> dict[str, Any]:
    return run(load([*VIT, *arguments], configs))


def _rates_by_epoch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[float]]]:
    """Record the keep rates that a run sets, and in which stage."""
    seen: list[tuple[str, list[float]]] = []
    start, end = KeepRateWarmup.on_train_batch_start, KeepRateWarmup.on_validation_start

    def note(stage: str, original: Callable[..., None]) -> Callable[..., None]:
        def hook(self: KeepRateWarmup, trainer: Any, module: Any, *rest: Any) -> None:
            original(self, trainer, module, *rest)
            rates = [part.keep_rate for part in module.model.reducers if hasattr(part, "keep_rate")]
            seen.append((stage, rates))

        return hook

    monkeypatch.setattr(KeepRateWarmup, "on_train_batch_start", note("train", start))
    monkeypatch.setattr(KeepRateWarmup, "on_validation_start", note("val", end))
    return seen


EVIT = ("model=evit_deit_small_patch16_224", "reduction.shrink_start_epoch=0.4", "reduction.shrink_epochs=1")


def test_evit_is_warmed_up_and_judged_at_its_own_rate(
    configs: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = _rates_by_epoch(monkeypatch)
    _run(configs, *EVIT, "model.kwargs.keep_rate=0.5", f"out={tmp_path / 'run'}")
    assert [stage for stage, _ in seen] == [*["train"] * 5, "val"] * 2
    rates = [values[0] for stage, values in seen if stage == "train"]
    assert rates[:3] == [1, 1, 1] and rates[7:] == [0.5] * 3
    assert rates[2:8] == sorted(set(rates[2:8]), reverse=True)
    assert all(values == [0.5] * 3 for stage, values in seen if stage == "val")


@pytest.mark.slow
def test_a_resumed_warm_start_equals_an_uninterrupted_one(
    configs: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a teacher and a backbone that is frozen at first, weights and losses are equal bit for bit."""
    from mixerzoo.vision.training.tasks import Task

    teacher = _saved(tmp_path / "teacher.ckpt")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = (*EVIT, "model.kwargs.keep_rate=0.5", TEACHER, f"distill.checkpoint={teacher}", "train.save_every=1")
    arguments += ("augment.mixup=0.3", 'optim.freeze_epochs={"*": 0.8, head.*: 0}')
    _run(configs, *arguments, f"out={whole}")

    class Killed(BaseException):
        pass

    def die(task: Task, *_: Any) -> None:
        if task.global_step == 4:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "on_before_zero_grad", die)
        with pytest.raises(Killed):
            _run(configs, *arguments, f"out={parts}")
    run(load([f"resume={parts}"], configs))
    assert (parts / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    one, two = (load_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (whole, parts))
    assert one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
    assert not any("teacher" in name or "objective" in name for name in one)
    rows = read_table(whole / "metrics.csv")
    assert all({"train/loss", "train/loss_labels", "train/loss_logits"} <= set(row) for row in rows)
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/loss_labels"] + 0.5 * row["train/loss_logits"])


def test_a_backbone_under_a_head_is_warmed_up_too(configs: Path) -> None:
    arguments = [*VIT, *EVIT, "data=fashion_scenes", "head.channels=8", "data.size=16", "model.kwargs.keep_rate=0.5"]
    config = load(arguments, configs)
    model = build_model(config, _splits(3, dense=True))
    warmup = make_keep_rate_warmup(model, config, make_plan(config, 320))
    assert warmup is not None and warmup.own == [0.5, 0.5, 0.5]
    warmup.set_rates([0.9] * 3)
    assert {module.keep_rate for module in model.modules() if hasattr(module, "keep_rate")} == {0.9}
    with pytest.raises(ConfigError, match=r"train\.compile=true would compile it each time"):
        make_keep_rate_warmup(model, load([*arguments, "train.compile=true"], configs), make_plan(config, 320))
    assert distillation.target_keep_rates(model) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("tome_deit_tiny_patch16_224", "model.kwargs.r=3"),
        ("evit_deit_small_patch16_224", "reduction.shrink_epochs=1"),
        ("dynamicvit_deit_small_patch16_224", "model.kwargs.keep_rate=0.5"),
    ],
)
def test_segmentation_trains_on_models_with_fewer_tokens(
    name: str, given: str, configs: Path, tmp_path: Path, no_pictures: None
) -> None:
    """Every feature map has all positions, and every trainable parameter gets a gradient."""
    arguments = [
        *("recipe=segmentation", f"model={name}", "data.scenes=12", "data.size=32", "train.batch_size=4"),
        *("train.epochs=1", "train.progress=false", "train.limit_batches=3", "head.channels=8"),
        *("model.kwargs={img_size: 32, patch_size: 4, embed_dim: 24, depth: 4, num_heads: 2}", given),
        *("optim.weight_decay=0", "schedule.warmup_epochs=0", "data.download=false"),
    ]
    config = load([*arguments, f"out={tmp_path / 'run'}"], configs)
    results = run(config)
    assert 0 <= results["test"]["mean_iou"] <= 1
    splits = run_module.load_data(config)
    run_module.seed_everything(run_module.mix_seed(config.seed))
    before = build_model(config, splits)
    after = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    same = {n for n, p in before.named_parameters() if torch.equal(p, after[f"model.{n}"])}
    assert all("predictor" in n for n in same), same
    assert before.backbone(torch.randn(2, splits.channels, 32, 32))[-1].shape[-2:] == (8, 8)
