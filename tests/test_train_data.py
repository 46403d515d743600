"""Recipes, order, and images: what a run sees is a function of seed and position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from runs import OPTIONS, tiny
from torch import Tensor

import seqconv_triton as sct
from recipes.training import Config, architecture
from recipes.training.config import differences
from recipes.training.distributed import Ranks
from recipes.training.images import Preprocess, decode
from recipes.training.loading import Loader, Samples
from recipes.training.order import epoch_order, evaluation_pieces, shares, steps_per_epoch
from recipes.training.trainer import Trainer


@pytest.mark.parametrize(
    ("config", "epochs", "batch", "rates"),
    [
        (Config("cifar10", Path("x")), 300, 64, {1: 0.1, 150: 0.1, 151: 0.01, 225: 0.01, 226: 0.001, 300: 0.001}),
        (Config("cifar100", Path("x")), 300, 64, {150: 0.1, 151: 0.01}),
        (
            Config("imagefolder", Path("x")), 100, 256,
            {30: 0.1, 31: 0.01, 60: 0.01, 61: 0.001, 90: 0.001, 91: 0.0001, 100: 0.0001},
        ),
        (Config("imagefolder", Path("x"), epochs=10), 10, 256, {3: 0.1, 4: 0.01, 6: 0.01, 7: 0.001, 10: 0.0001}),
        (Config(epochs=1), 1, 64, {1: 0.1}),
        (Config("cifar10", Path("x"), epochs=8, milestones=(2,), learning_rate=0.5), 8, 64, {2: 0.5, 3: 0.05, 8: 0.05}),
        (Config(epochs=8, milestones=()), 8, 64, {8: 0.1}),
    ],
    ids=["cifar10", "cifar100", "imagenet", "imagenet-shorter", "one-epoch", "own-milestones", "no-milestones"],
)  # fmt: skip
def test_recipe(config: Config, epochs: int, batch: int, rates: dict[int, float]) -> None:
    """PAPER: epochs, batch and learning rates; the drops move along with fewer epochs."""
    assert (config.recipe.epochs, config.recipe.batch_size) == (epochs, batch)
    assert {epoch: config.recipe.learning_rate_in(epoch) for epoch in rates} == pytest.approx(rates, rel=1e-12)


def test_optimizer_is_the_paper_s() -> None:
    """SGD, Nesterov momentum 0.9, weight decay 1e-4 on every parameter, BN and biases too; dropout 0.1 in the model."""
    config = Config("cifar10", Path("x"))
    model = architecture.build(config.arch(10, 3))
    (group,) = Trainer(model, config.recipe, Ranks(torch.device("cpu"))).optimizer.param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["nesterov"], group["momentum"], group["weight_decay"], group["lr"]) == (True, 0.9, 1e-4, 0.1)
    assert {stage.dropout for stage in model.stages} == {0.1}


def test_accumulated_pieces_and_extras_give_the_batch_s_gradient() -> None:
    """Without BN between the images, pieces add up to the whole batch's step; label smoothing as PyTorch's mean."""
    torch.manual_seed(0)
    x, labels = torch.randn(7, 6, dtype=torch.float64), torch.randint(4, (7,))
    weights = []
    for pieces in ([(x, labels)], [(x[:3], labels[:3]), (x[3:], labels[3:])]):
        torch.manual_seed(1)
        model = torch.nn.Linear(6, 4, dtype=torch.float64)
        trainer = Trainer(model, Config().recipe, Ranks(torch.device("cpu")), label_smoothing=0.1, ema=0.5)
        totals = trainer.step(pieces, 7)
        torch.manual_seed(1)
        expected = torch.nn.Linear(6, 4, dtype=torch.float64)
        logits = expected(x)
        loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        torch.testing.assert_close(totals.tolist(), [7 * loss.item(), float((logits.argmax(1) != labels).sum())])
        loss.backward()
        torch.testing.assert_close(model.weight.grad, expected.weight.grad)
        weights.append(model.weight)
        torch.testing.assert_close(trainer.averaged.module.weight, model.weight)  # the first average is the weights
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("images", "batch", "world", "accumulate"),
    [(20, 6, 1, 1), (20, 6, 2, 1), (23, 6, 2, 2), (5, 8, 3, 1), (13, 4, 4, 1)],
    ids=["one", "two", "two-accumulating", "smaller-than-a-batch", "last-batch-too-small-for-all"],
)
def test_shares_are_the_batch_of_one_process(images: int, batch: int, world: int, accumulate: int) -> None:
    order = epoch_order(images, 0, 1)
    pieces = world * accumulate
    ranks = [list(shares(order, batch, world=world, rank=rank, accumulate=accumulate)) for rank in range(world)]
    seen = []
    for step, one in enumerate(zip(*ranks, strict=True)):
        together = [index for share in one for piece in share.pieces for index in piece]
        sizes = [len(piece) for share in one for piece in share.pieces]
        assert together == order[step * batch : (step + 1) * batch]
        assert {share.images for share in one} == {len(together)}
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        seen += together
    assert len(ranks[0]) == steps_per_epoch(images, batch, pieces)
    assert images - len(seen) < pieces
    resumed = list(shares(order, batch, world=world, accumulate=accumulate, start=1))
    assert resumed == ranks[0][1:]
    evaluated = [index for rank in range(world) for piece in evaluation_pieces(images, batch, world=world, rank=rank)
                 for index in piece]  # fmt: skip
    assert sorted(evaluated) == list(range(images))


def test_order_depends_on_seed_and_epoch() -> None:
    orders = [epoch_order(50, seed, epoch) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_order(50, 0, 1) == orders[0]


def test_differences_name_settings() -> None:
    before = tiny(Path("a")).binding()
    assert differences(before, tiny(Path("b"), workers=3, compile=True).binding()) == []
    assert differences(before, tiny(Path("a"), ema=0.9, seed=1).binding()) == ["ema: 0.0 → 0.9", "seed: 0 → 1"]
    wider = tiny(Path("a"), model_options={**OPTIONS, "widen": 3}).binding()
    assert differences(before, wider) == [f"widen: {OPTIONS['widen']} → 3"]


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["blocks=1,2,1", "dropout=0.2"], {"blocks": (1, 2, 1), "dropout": 0.2}),
        (["bottleneck=true", "name=abc"], {"bottleneck": True, "name": "abc"}),
    ],
    ids=["numbers", "words"],
)
def test_model_options(texts: list[str], options: dict[str, object]) -> None:
    assert architecture.parse_options(texts) == options


def test_architecture_builds_registered_and_custom_models() -> None:
    custom = {"group_width": 4, "widen": 1, "num_classes": 3, "in_chans": 1, "blocks": (1, 1, 2)}
    assert isinstance(architecture.build({"name": "cifar_custom", "options": custom}), sct.CifarSeqResNet)
    named = architecture.build({"name": "seqresnet_b22", "options": {"num_classes": 7, "in_chans": 3}}, device="meta")
    assert isinstance(named, sct.SeqResNetB22) and named.num_classes == 7


PIL_Image = pytest.importorskip("PIL.Image", reason="pillow")


@pytest.mark.parametrize("size", [(10, 14), (14, 9), (7, 7), (33, 20)], ids=["tall", "wide", "small", "large"])
def test_preprocess_resizes_crops_and_normalises(size: tuple[int, int]) -> None:
    """The middle of a horizontal ramp stays there, to the half pixel of an odd margin; white paper becomes 0."""
    ramp = np.linspace(0, 255, size[0], dtype=np.uint8)[None].repeat(size[1], 0)
    prepare = Preprocess(3, 6, 8, (0.5, 0.4, 0.3), (0.2, 0.2, 0.5))
    out = prepare(PIL_Image.fromarray(ramp))
    assert out.shape == (3, 6, 6)
    middle = (out * torch.tensor(prepare.std).view(3, 1, 1) + torch.tensor(prepare.mean).view(3, 1, 1)).mean((1, 2))
    torch.testing.assert_close(middle, torch.full((3,), 0.5), atol=0.5 / 8, rtol=0)
    ink = Preprocess(1, 6, 8, (0.0,), (1.0,), inverted=True)(PIL_Image.new("RGB", size, (255, 255, 255)))
    assert ink.shape == (1, 6, 6) and (ink == 0).all()


class Folder:
    """What torchvision's ImageFolder offers: (image, label) by index, and `samples` with the paths."""

    def __init__(self, folder: Path, count: int) -> None:
        generator = np.random.default_rng(0)
        self.samples = []
        for i in range(count):
            path = folder / f"{i}.png"
            PIL_Image.fromarray(generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
            self.samples.append((path, i))

    def __getitem__(self, index: int) -> tuple[object, int]:
        path, label = self.samples[index]
        with PIL_Image.open(path) as image:
            return image.convert("RGB"), label


def noisy(image: object) -> Tensor:
    """An augmentation that draws from the global generator, as torchvision's do."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() + torch.rand(())


def load(folder: Folder, *, workers: int = 0, replace: bool = True, strict: bool = False) -> tuple[list, list[str]]:
    unreadable: list[str] = []
    samples = Samples(folder, noisy, range(len(folder.samples)), seed=3, replace=replace)
    loader = Loader(samples, workers, unreadable, strict=strict, pinned=False)
    batches = [list(loader.batches(epoch, [[4, 1, 0], [2, 3], [5, 4]])) for epoch in (1, 2)]
    loader.close()
    return batches, unreadable


def test_workers_change_nothing(tmp_path: Path) -> None:
    """Same bits with and without workers; other augmentation in another epoch; the caller's generator untouched."""
    folder = Folder(tmp_path, 6)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    alone, _ = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    two, _ = load(folder, workers=2)
    for epoch in (0, 1):
        for (images, labels), (others, other_labels) in zip(alone[epoch], two[epoch], strict=True):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)
    assert not torch.equal(alone[0][0][0], alone[1][0][0])
    assert torch.equal(alone[0][0][0][0], alone[0][2][0][1])  # image 4, wherever it stands in the epoch


def test_undecodable_images_are_replaced_or_left_out(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 6)
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "3.png").write_text("not an image")
    (epoch, _), unreadable = load(folder)
    assert [labels.tolist() for _, labels in epoch] == [[4, 1, 1], [4, 4], [5, 4]]
    assert [line.split(" (")[0] for line in unreadable] == [str(tmp_path / f"{i}.png") for i in (0, 2, 3)]
    (epoch, _), unreadable = load(folder, replace=False, workers=1)
    assert [labels.tolist() for _, labels in epoch] == [[4, 1], [5, 4]]
    assert len(unreadable) == 3
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"does not decode: .*0\.png") as caught:
            load(folder, workers=workers, strict=True)
        assert "\n" not in str(caught.value)


def test_a_disk_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 6)
    for path, _ in folder.samples:
        path.unlink()
    with pytest.raises(OSError, match=r"images of one batch do not decode: .*4.png"):
        load(folder)


def test_decode_keeps_nothing_open(tmp_path: Path) -> None:
    folder = Folder(tmp_path, 1)
    image = decode(folder.samples[0][0])
    folder.samples[0][0].unlink()
    assert image.size == (5, 6)
