"""Evaluate a network compiled and with its batch norms folded, and compare with the plain one.

The network is tiny so that this takes seconds; `sct.SeqResNetB42()` works the same way.
"""

import torch

import seqconv_triton as sct


def main() -> None:
    torch.manual_seed(0)
    model = sct.CifarSeqResNet(group_width=8, widen=1, bottleneck=True)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model(images)  # in training mode, so that batch norm has statistics worth folding
    model.eval()
    compiled = torch.compile(model, fullgraph=True)
    folded = sct.fuse(model)
    with torch.inference_mode():
        expected = model(images)
        for name, network in {"compiled": compiled, "folded": folded}.items():
            difference = (network(images) - expected).abs().max().item()
            print(f"{name}: largest difference of a logit {difference:.1e}")
            assert difference < 1e-4


if __name__ == "__main__":
    main()
