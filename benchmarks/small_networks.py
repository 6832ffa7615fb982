"""Small networks of transformers and diffusers, with random weights: what builds each, and the shape of one input."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, SPEECH = (3, 64, 64), (4000,)
WIDTHS, ONES, HEADS = [16, 16, 32, 32], [1, 1, 1, 1], [1, 1, 2, 2]
TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
POSITIONS = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
STAGES = ["stage1", "stage2", "stage3", "stage4"]


LOUD = {"initializer_range": 0.15}
"""Spread of weights; with that of a network to be trained, nothing of an image gets to the outputs of deep ones."""


@dataclass(frozen=True)
class Small:
    """A network, and the shape of one input without the axis of examples."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


class AtOneStep(nn.Module):
    """A network of diffusers at one time step, with the same condition for all."""

    def __init__(self, network: nn.Module, *condition: Tensor) -> None:
        super().__init__()
        self.network, self.condition = network, nn.ParameterList(condition)

    def forward(self, x: Tensor) -> Tensor:
        conditions = [one.expand(x.shape[0], -1, -1) for one in self.condition]
        found: Tensor = self.network(x, 10, *conditions).sample
        return found


def _transformers(name: str, configuration: Mapping[str, Any], **parts: Mapping[str, Any]) -> nn.Module:
    """A network by the name of its class; ``parts`` are configurations within its own, with a ``kind`` each."""
    library = importlib.import_module("transformers")
    network = getattr(library, name)
    inner = {
        key: getattr(library, part["kind"])(**{k: v for k, v in part.items() if k != "kind"})
        for key, part in parts.items()
    }
    found: nn.Module = network(network.config_class(**configuration, **inner))
    return found


def _whisper_encoder() -> nn.Module:
    whole = _transformers(
        "WhisperModel",
        {
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 64,
            "max_source_positions": 50,
        },
    )
    return whole.get_submodule("encoder")


def _diffusers(name: str, **options: Any) -> nn.Module:
    found: nn.Module = getattr(importlib.import_module("diffusers"), name)(**options)
    return found


def _unet(name: str, channels: int, down: str, up: str, *condition: tuple[int, ...], **options: Any) -> nn.Module:
    """A U-Net at one time step; ``condition``: the shape of what else it takes."""
    network = _diffusers(
        name,
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", down),
        up_block_types=(up, "UpBlock2D"),
        attention_head_dim=8,
        **options,
    )
    return AtOneStep(network, *map(torch.randn, condition))


def _of_transformers(name: str, shape: tuple[int, ...] = IMAGE, /, **configuration: Any) -> Small:
    return Small(partial(_transformers, name, configuration), shape)


_SPEECH = TRANSFORMER | POSITIONS
_BLOCKS = {"block_out_channels": (16, 16), "norm_num_groups": 8}
_ENDS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}

SMALL: Mapping[str, Small] = MappingProxyType(
    {
        "transformers:resnet": _of_transformers(
            "ResNetForImageClassification", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic"
        ),
        "transformers:convnext": _of_transformers("ConvNextForImageClassification", hidden_sizes=WIDTHS, depths=ONES),
        "transformers:convnextv2": _of_transformers(
            "ConvNextV2ForImageClassification", hidden_sizes=WIDTHS, depths=ONES
        ),
        "transformers:regnet": _of_transformers(
            "RegNetForImageClassification",
            embedding_size=16,
            hidden_sizes=[32, 32, 64, 64],
            depths=ONES,
            groups_width=16,
        ),
        "transformers:bit": _of_transformers(
            "BitForImageClassification", embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=ONES, num_groups=8
        ),
        "transformers:efficientnet": _of_transformers(
            "EfficientNetForImageClassification",
            image_size=64,
            width_coefficient=0.5,
            depth_coefficient=0.5,
            hidden_dim=640,
            **LOUD,
        ),
        "transformers:mobilenet_v1": _of_transformers(
            "MobileNetV1ForImageClassification", depth_multiplier=0.5, **LOUD
        ),
        "transformers:mobilenet_v2": _of_transformers(
            "MobileNetV2ForImageClassification", depth_multiplier=0.5, **LOUD
        ),
        "transformers:mobilevit": _of_transformers(
            "MobileViTForImageClassification",
            image_size=64,
            hidden_sizes=[32, 48, 64],
            neck_hidden_sizes=[16, 16, 24, 32, 48, 64, 128],
        ),
        "transformers:mobilevitv2": _of_transformers(
            "MobileViTV2ForSemanticSegmentation", image_size=64, width_multiplier=0.25
        ),
        "transformers:poolformer": _of_transformers(
            "PoolFormerForImageClassification", hidden_sizes=WIDTHS, depths=ONES
        ),
        "transformers:levit": _of_transformers(
            "LevitForImageClassification",
            image_size=64,
            hidden_sizes=[32, 48, 64],
            num_attention_heads=[1, 2, 2],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
        "transformers:pvt_v2": _of_transformers(
            "PvtV2ForImageClassification", image_size=64, hidden_sizes=WIDTHS, depths=ONES, num_attention_heads=HEADS
        ),
        "transformers:focalnet": _of_transformers(
            "FocalNetForImageClassification",
            image_size=64,
            embed_dim=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
        ),
        "transformers:textnet": _of_transformers(
            "TextNetForImageClassification",
            stem_out_channels=16,
            hidden_sizes=[16, 16, 16, 32, 32],
            conv_layer_kernel_sizes=[[[3, 3]]] * 4,
            conv_layer_strides=[[2]] * 4,
        ),
        "transformers:rt_detr_resnet": _of_transformers(
            "RTDetrResNetBackbone",
            embedding_size=16,
            hidden_sizes=[32, 32, 64, 64],
            depths=ONES,
            out_features=STAGES[1:],
        ),
        "transformers:segformer": _of_transformers(
            "SegformerForSemanticSegmentation",
            hidden_sizes=WIDTHS,
            depths=ONES,
            num_attention_heads=HEADS,
            decoder_hidden_size=32,
        ),
        "transformers:glpn": _of_transformers(
            "GLPNForDepthEstimation",
            hidden_sizes=WIDTHS,
            depths=ONES,
            num_attention_heads=HEADS,
            decoder_hidden_size=16,
        ),
        "transformers:dpt": _of_transformers(
            "DPTForDepthEstimation",
            image_size=64,
            patch_size=16,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=37,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=WIDTHS,
            fusion_hidden_size=16,
        ),
        "transformers:swin2sr": _of_transformers(
            "Swin2SRForImageSuperResolution",
            (3, 32, 32),
            image_size=32,
            embed_dim=16,
            depths=[1],
            num_heads=[2],
            window_size=4,
        ),
        "transformers:upernet": Small(
            partial(
                _transformers,
                "UperNetForSemanticSegmentation",
                {"hidden_size": 32, "auxiliary_in_channels": 32},
                backbone_config={
                    "kind": "ConvNextConfig",
                    "hidden_sizes": WIDTHS,
                    "depths": ONES,
                    "out_features": STAGES,
                },
            ),
            IMAGE,
        ),
        "transformers:vitmatte": Small(
            partial(
                _transformers,
                "VitMatteForImageMatting",
                {"hidden_size": 32, "fusion_hidden_sizes": [32] * 4, "convstream_hidden_sizes": [16] * 3},
                backbone_config={
                    "kind": "VitDetConfig",
                    "hidden_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 64,
                    "patch_size": 16,
                    "num_channels": 4,
                    "pretrain_image_size": 64,
                    "window_block_indices": [],
                    "residual_block_indices": [],
                    "out_features": ["stage1"],
                },
            ),
            (4, 64, 64),
        ),
        "transformers:whisper_encoder": Small(_whisper_encoder, (80, 100)),
        "transformers:wav2vec2": _of_transformers(
            "Wav2Vec2ForCTC", SPEECH, **_SPEECH, conv_dim=(16,) * 7, vocab_size=32
        ),
        "transformers:hubert": _of_transformers(
            "HubertForSequenceClassification", SPEECH, **_SPEECH, conv_dim=(16,) * 7
        ),
        "transformers:sew": _of_transformers(
            "SEWModel", (1600,), **_SPEECH, conv_dim=(16,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3)
        ),
        "transformers:hifigan": _of_transformers(
            "SpeechT5HifiGan",
            (20, 20),
            model_in_dim=20,
            upsample_initial_channel=32,
            upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8],
        ),
        "diffusers:unet": Small(partial(_unet, "UNet2DModel", 3, "AttnDownBlock2D", "AttnUpBlock2D"), (3, 16, 16)),
        "diffusers:unet_condition": Small(
            partial(
                _unet,
                "UNet2DConditionModel",
                4,
                "CrossAttnDownBlock2D",
                "CrossAttnUpBlock2D",
                (1, 7, 16),
                cross_attention_dim=16,
            ),
            (4, 16, 16),
        ),
        "diffusers:autoencoder_kl": Small(partial(_diffusers, "AutoencoderKL", **_BLOCKS, **_ENDS), (3, 32, 32)),
        "diffusers:autoencoder_tiny": Small(
            partial(
                _diffusers,
                "AutoencoderTiny",
                encoder_block_out_channels=(16, 16),
                decoder_block_out_channels=(16, 16),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            ),
            (3, 32, 32),
        ),
        "diffusers:vq_model": Small(
            partial(_diffusers, "VQModel", **_BLOCKS, **_ENDS, num_vq_embeddings=32), (3, 16, 16)
        ),
    }
)
