"""SeqConv2d in place of the wide convolutions of a small VGG-like network: same shapes, as many parameters."""

import torch
from torch import nn

import seqconv_triton as sct


def plain(in_channels: int, out_channels: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


def sequential(in_channels: int, out_channels: int) -> nn.Module:
    return sct.SeqConv2d(in_channels, out_channels, group_width=16)  # BN and ReLU are inside


def network(layer) -> nn.Module:
    return nn.Sequential(
        plain(3, 32),
        layer(32, 64),
        nn.MaxPool2d(2),
        layer(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def main() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
    for name, layer in {"plain": plain, "SeqConv": sequential}.items():
        model = network(layer)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:<8} {parameters:,} parameters, first loss {loss.item():.2f}")
    print(network(sequential)[3].plan)


if __name__ == "__main__":
    main()
