"""A plain PyTorch training loop: scikit-learn's handwritten digits, 8×8 pixels, three epochs on a CPU.

Needs scikit-learn: pip install 'seqconv-triton[demo]'.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import seqconv_triton as sct


def main(epochs: int = 3) -> float:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16 - 0.3
    train, test = random_split(TensorDataset(images, torch.from_numpy(digits.target)), [1437, 360])

    model = sct.CifarSeqResNet(group_width=16, widen=1, dropout=0.0, in_chans=1)
    optimizer = torch.optim.SGD(sct.parameter_groups(model, 1e-4), lr=0.05, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    accuracy = 0.0
    for epoch in range(epochs):
        model.train()
        for x, y in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        schedule.step()
        model.eval()
        with torch.inference_mode():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(test, batch_size=360))
        accuracy = right / len(test)
        print(f"epoch {epoch + 1}: {accuracy:.1%} of {len(test)} test images right")
    return accuracy


if __name__ == "__main__":
    main()
