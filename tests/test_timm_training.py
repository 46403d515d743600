"""Weights, training and documentation of the models under timm."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import error, python_blocks, randomise
from timm_networks import needs_timm, shrink

import seqconv_triton as sct


@needs_timm
def test_weights(timm: ModuleType, tmp_path: Path) -> None:
    """None are shipped; one's own load, also under the published names, with other images and classes."""
    for options in ({}, {"pretrained_cfg_overlay": {"num_classes": 10}}):
        with pytest.raises(
            RuntimeError, match=r"no weights are shipped for cifar_seqresnet_r4_k8.*pretrained_cfg_overlay"
        ):
            timm.create_model("cifar_seqresnet_r4_k8", pretrained=True, **options)
    assert not timm.list_models("*seqresne?_*", pretrained=True)
    model = randomise(sct.create_model("cifar_seqresnet_r4_k8"), layer_b=0.1).eval()
    x = torch.randn(2, 3, 16, 16)
    for file, state in (("own.pt", model.state_dict()), ("published.pt", sct.export_published(model))):
        torch.save(state, tmp_path / file)
        overlay = {"file": str(tmp_path / file)}
        loaded = timm.create_model("cifar_seqresnet_r4_k8", pretrained=True, pretrained_cfg_overlay=overlay).eval()
        assert error(loaded(x), model(x)) < 1e-6
    overlay = {"file": str(tmp_path / "own.pt")}
    other = timm.create_model(
        "cifar_seqresnet_r4_k8", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=4
    )
    assert other(x[:, :1]).shape == (2, 4)
    assert error(other.stem[0].weight, model.stem[0].weight.sum(1, keepdim=True)) < 1e-6
    direct = timm.create_model("cifar_seqresnet_r4_k8", checkpoint_path=str(tmp_path / "own.pt")).eval()
    assert error(direct(x), model(x)) < 1e-6


@needs_timm
def test_training_tools(timm: ModuleType) -> None:
    """Layer-wise rates, weight decay, dropout in front of the classifier, checkpointing, a step of timm's optimizer."""
    shrink()
    model = timm.create_model("seqresnet_b22", num_classes=3, drop_rate=0.5).train()
    from timm.models import group_parameters
    from timm.optim import create_optimizer_v2

    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    names = {name for name, _ in model.named_parameters()}
    assert set(groups) == names
    assert groups["stem.0.weight"] < groups["stages.0.norm.weight"] < groups["stages.3.norm.weight"]
    assert groups["stages.3.norm.weight"] < groups["classifier.weight"]
    assert model.no_weight_decay() == set()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, param_group_fn=lambda m: sct.parameter_groups(m, 1e-4))
    flat = model.stem[4].reduce_weight
    assert flat.dim() == 1 and any(flat is p for p in optimizer.param_groups[0]["params"])
    assert optimizer.param_groups[0]["weight_decay"] == 1e-4
    model.set_grad_checkpointing()
    features = torch.rand(2, 64, 2, 2)
    torch.manual_seed(3)
    pooled = model.forward_head(features, pre_logits=True)
    assert 0 < (pooled == 0).float().mean() < 1
    before = flat.detach().clone()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(flat, before)
    assert torch.equal(model.eval().forward_head(features, pre_logits=True), features.mean((2, 3)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    assert error(compiled(x), model(x)) < 1e-5


@needs_timm
def test_documentation_runs() -> None:
    """Every Python block of docs/timm.md."""
    for code in python_blocks("timm.md"):
        exec(code, {})


@needs_timm
def test_an_epoch_as_in_timms_training_script(timm: ModuleType, tmp_path: Path) -> None:
    """Its dataset, loader, loss, optimizer, scheduler and EMA, on images that tell their class by their brightness."""
    from PIL import Image
    from timm.data import create_dataset, create_loader, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    for i in range(32):
        folder = tmp_path / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (i % 2 * 200 + i,) * 3).save(folder / f"{i}.png")
    model = timm.create_model("cifar_seqresnet_b_r7_k16", num_classes=2, drop_rate=0.1)
    config = resolve_data_config({}, model=model)
    loader = create_loader(
        create_dataset("", root=str(tmp_path)), config["input_size"], batch_size=8, is_training=False, num_workers=0,
        use_prefetcher=False, persistent_workers=False, mean=config["mean"], std=config["std"],
        crop_pct=config["crop_pct"], interpolation=config["interpolation"],
    )  # fmt: skip
    optimizer = create_optimizer_v2(model, "sgd", lr=0.02, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=3)
    ema, loss_function, losses = ModelEmaV3(model, decay=0.5), LabelSmoothingCrossEntropy(0.1), []
    for epoch in range(epochs):
        for images, target in loader:
            loss = loss_function(model.train()(images), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert ema.module.eval()(images).shape == (8, 2)
