"""Sequentially aggregated convolutional networks (Huang et al., 2019), fast: layers, stages and the paper's models."""

from seqconv_triton.backend import use_backend
from seqconv_triton.interop.convert import convert
from seqconv_triton.interop.published import export_published, load_published
from seqconv_triton.models.cifar import CifarSeqResNet
from seqconv_triton.models.fuse import fuse
from seqconv_triton.models.imagenet import SeqResNetB22, SeqResNetB42, SeqResNeXt24
from seqconv_triton.models.registry import create_model, list_models
from seqconv_triton.nn.layers import SeqConv2d, Stage
from seqconv_triton.nn.parameter_groups import parameter_groups
from seqconv_triton.nn.synchronised import convert_sync_batchnorm
from seqconv_triton.plan import Group, Plan

__version__ = "0.1.0"
__all__ = [
    "CifarSeqResNet",
    "Group",
    "Plan",
    "SeqConv2d",
    "SeqResNeXt24",
    "SeqResNetB22",
    "SeqResNetB42",
    "Stage",
    "convert",
    "convert_sync_batchnorm",
    "create_model",
    "export_published",
    "fuse",
    "list_models",
    "load_published",
    "parameter_groups",
    "use_backend",
]
