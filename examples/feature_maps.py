"""Features of every stage, as a detector would take them, and a Grad-CAM map from the last ones."""

import torch

import seqconv_triton as sct


def main() -> None:
    torch.manual_seed(0)
    model = sct.create_model("cifar_seqresnet_b_r7_k16").eval()
    images = torch.randn(2, 3, 32, 32)

    with torch.inference_mode():
        features = model.forward_intermediates(images, intermediates_only=True)
    for info, maps in zip(model.feature_info, features, strict=True):
        print(f"{info['module']}: {tuple(maps.shape)}, every {info['reduction']} pixels")

    # Grad-CAM (Selvaraju et al., 2017): channels weighted by their mean gradient for the predicted class.
    features = model.forward_features(images).detach().requires_grad_()
    logits = model.forward_head(features)
    (gradient,) = torch.autograd.grad(logits.max(1).values.sum(), features)
    heat = torch.relu((gradient.mean((2, 3), keepdim=True) * features).sum(1))
    print(f"Grad-CAM: {tuple(heat.shape)}, from {heat.min().item():.3f} to {heat.max().item():.3f}")


if __name__ == "__main__":
    main()
