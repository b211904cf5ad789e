"""Forty small networks that other people wrote, with random weights, each with a batch and a loss.

Nothing is downloaded: the code is that of transformers, timm, torch_geometric, torchvision and torch.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn


class Animal(NamedTuple):
    """A network, what it is given, and the loss that it is trained with."""

    network: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]


Maker = Callable[[], Animal]


def package(name: str) -> Any:
    """A package of the extra ``zoo``, or a skipped test that says which one is missing."""
    return pytest.importorskip(name, reason=f"{name} is not installed; pip install lightning_mixprec[zoo]")


def images(size: int = 32, count: int = 4) -> Tensor:
    return torch.randn(count, 3, size, size)


def tokens(length: int = 12, vocabulary: int = 40, count: int = 2) -> Tensor:
    return torch.randint(5, vocabulary, (count, length))


def scored(network: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of a classifier's scores."""
    inputs, labels = batch
    return nn.functional.cross_entropy(network(inputs).float(), labels)


def own_loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that a network of transformers computes itself."""
    loss: Tensor = network(**batch).loss
    return loss


def largest_hidden(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss for a network of transformers that has none: how large its last hidden state is."""
    state: Tensor = network(**batch).last_hidden_state
    return (state.float() - 0.5).square().mean()


# transformers

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_DECODER = {**_SMALL, "vocab_size": 40, "num_key_value_heads": 1, "max_position_embeddings": 32}
_VISION = {**_SMALL, "image_size": 32, "patch_size": 8}
_ENCODER_DECODER = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


def of_transformers(network: str, config: str, options: dict[str, Any], make: Callable[[], Any]) -> Maker:
    """A network of transformers from a small configuration; one with labels in its batch computes its own loss."""

    def animal() -> Animal:
        transformers = package("transformers")
        made = getattr(transformers, network)(getattr(transformers, config)(**options))
        batch = make()
        return Animal(made, batch, own_loss if "labels" in batch else largest_hidden)

    return animal


def language(length: int = 12) -> dict[str, Tensor]:
    text = tokens(length)
    return {"input_ids": text, "labels": text.clone()}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": images(), "labels": torch.randint(2, (4,))}


def pairs() -> dict[str, Tensor]:
    return {"input_ids": tokens(8, count=4), "pixel_values": images(), "return_loss": True}  # type: ignore[dict-item]


def clip() -> Animal:
    transformers = package("transformers")
    config = transformers.CLIPConfig(
        text_config={**_SMALL, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config=_VISION,
        projection_dim=16,
    )
    return Animal(transformers.CLIPModel(config), pairs(), own_loss)


def segformer() -> Animal:
    transformers = package("transformers")
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
    )
    batch = {"pixel_values": images(), "labels": torch.randint(2, (4, 32, 32))}
    return Animal(transformers.SegformerForSemanticSegmentation(config), batch, own_loss)


def wav2vec2() -> Animal:
    transformers = package("transformers")
    config = transformers.Wav2Vec2Config(
        **{**_SMALL, "vocab_size": 20},
        conv_dim=[16, 16],
        conv_kernel=[10, 3],
        conv_stride=[5, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
    )
    batch = {"input_values": torch.randn(2, 400), "labels": torch.randint(1, 20, (2, 4))}
    return Animal(transformers.Wav2Vec2ForCTC(config), batch, own_loss)


def whisper() -> Animal:
    transformers = package("transformers")
    config = transformers.WhisperConfig(
        **{k: v for k, v in _ENCODER_DECODER.items() if k != "max_position_embeddings"},
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
    )
    batch = {"input_features": torch.randn(2, 8, 32), "labels": tokens(6)}
    return Animal(transformers.WhisperForConditionalGeneration(config), batch, own_loss)


_T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
_T5 |= {"decoder_start_token_id": 0}
_MIXTRAL = {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
_QWEN_MOE = {**_DECODER, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
_QWEN_MOE |= {"shared_expert_intermediate_size": 32, "output_router_logits": True}
_GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
_MASKED = {**_SMALL, "vocab_size": 40, "max_position_embeddings": 32}
_DEBERTA = {**_MASKED, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}

_OF_TRANSFORMERS = {
    "bert": of_transformers("BertForMaskedLM", "BertConfig", _MASKED, language),
    "albert": of_transformers("AlbertForMaskedLM", "AlbertConfig", {**_MASKED, "embedding_size": 16}, language),
    "deberta": of_transformers("DebertaV2ForMaskedLM", "DebertaV2Config", _DEBERTA, language),
    "gpt2": of_transformers("GPT2LMHeadModel", "GPT2Config", _GPT2, language),
    "llama": of_transformers("LlamaForCausalLM", "LlamaConfig", _DECODER, language),
    "mistral": of_transformers("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 8}, language),
    "gemma": of_transformers("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 16}, language),
    "mixtral": of_transformers("MixtralForCausalLM", "MixtralConfig", _MIXTRAL, language),
    "qwen moe": of_transformers("Qwen2MoeForCausalLM", "Qwen2MoeConfig", _QWEN_MOE, language),
    "t5": of_transformers("T5ForConditionalGeneration", "T5Config", _T5, language),
    "bart": of_transformers("BartForConditionalGeneration", "BartConfig", _ENCODER_DECODER, language),
    "vit": of_transformers("ViTForImageClassification", "ViTConfig", _VISION, pictures),
    "swin": of_transformers("SwinForImageClassification", "SwinConfig", _SWIN, pictures),
    "dinov2": of_transformers("Dinov2Model", "Dinov2Config", _VISION, lambda: {"pixel_values": images()}),
    "clip": clip,
    "segformer": segformer,
    "wav2vec2": wav2vec2,
    "whisper": whisper,
}


# timm and torchvision


def of_timm(name: str, size: int = 32, **options: Any) -> Maker:
    def animal() -> Animal:
        network = package("timm").create_model(name, num_classes=4, **options)
        return Animal(network, (images(size), torch.randint(4, (4,))), scored)

    return animal


def of_torchvision(name: str, size: int = 32, **options: Any) -> Maker:
    def animal() -> Animal:
        package("torchvision")
        models = importlib.import_module("torchvision.models")
        network = models.get_model(name, weights=None, num_classes=4, **options)
        return Animal(network, (images(size), torch.randint(4, (4,))), scored)

    return animal


def mixer() -> Animal:
    package("timm")
    models = importlib.import_module("timm.models.mlp_mixer")
    network = models.MlpMixer(num_classes=4, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)
    return Animal(network, (images(), torch.randint(4, (4,))), scored)


def segmentation() -> Animal:
    package("torchvision")
    models = importlib.import_module("torchvision.models")
    network = models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=4)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(network(inputs)["out"].float(), labels)

    return Animal(network, (images(), torch.randint(4, (4, 32, 32))), loss)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}

_OF_PICTURES = {
    "timm resnet": of_timm("resnet10t"),
    "timm efficientnet": of_timm("efficientnet_lite0"),
    "timm mobilenet": of_timm("mobilenetv3_small_050"),
    "timm convnext": of_timm("convnext_atto", **_CONVNEXT),
    "timm vit": of_timm("vit_tiny_patch16_224", **_VIT),
    "timm mixer": mixer,
    "timm regnet": of_timm("regnetx_002"),
    "timm ghostnet": of_timm("ghostnet_050"),
    "timm edgenext": of_timm("edgenext_xx_small", 64),
    "torchvision shufflenet": of_torchvision("shufflenet_v2_x0_5"),
    "torchvision squeezenet": of_torchvision("squeezenet1_1"),
    "torchvision mnasnet": of_torchvision("mnasnet0_5"),
    "torchvision segmentation": segmentation,
}


# torch_geometric and torch


def of_graphs(layer: str, **options: Any) -> Maker:
    """Two layers of torch_geometric with a norm between them; the batch is a ``Data``."""

    def animal() -> Animal:
        package("torch_geometric")
        layers, data = (importlib.import_module(f"torch_geometric.{name}") for name in ("nn", "data"))
        kind = getattr(layers, layer)

        class Graphs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                if layer == "GINConv":
                    self.first = kind(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)))
                    self.second = kind(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)))
                else:
                    self.first, self.second = kind(8, 16, **options), kind(16, 4, **options)
                self.norm = layers.BatchNorm(16)

            def forward(self, graph: Any) -> Tensor:
                hidden = self.norm(self.first(graph.x, graph.edge_index)).relu()
                scores: Tensor = self.second(hidden, graph.edge_index)
                return scores

        graph = data.Data(x=torch.randn(10, 8), edge_index=torch.randint(10, (2, 30)), y=torch.randint(4, (10,)))
        return Animal(Graphs(), graph, lambda net, graph: nn.functional.cross_entropy(net(graph).float(), graph.y))

    return animal


class _Recurrent(nn.Module):
    """A cell that is used at every step of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 16), nn.Linear(16, 4)

    def forward(self, sequences: Tensor) -> Tensor:
        state = sequences.new_zeros(len(sequences), 16)
        for now in sequences.unbind(1):
            state = self.cell(now, state)
        scores: Tensor = self.head(state)
        return scores


def recurrent() -> Animal:
    return Animal(_Recurrent(), (torch.randn(4, 10, 8), torch.randint(4, (4,))), scored)


def lstm() -> Animal:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 16, batch_first=True, bidirectional=True), nn.Linear(32, 4)

        def forward(self, sequences: Tensor) -> Tensor:
            scores: Tensor = self.head(self.lstm(sequences)[0].mean(1))
            return scores

    return Animal(Speech(), (torch.randn(4, 10, 8), torch.randint(4, (4,))), scored)


def translation() -> Animal:
    network = nn.Transformer(32, 2, 1, 1, 64, dropout=0.0, batch_first=True)
    batch = (torch.randn(2, 8, 32), torch.randn(2, 6, 32))
    return Animal(network, batch, lambda net, both: net(*both).float().square().mean())


ANIMALS: dict[str, Maker] = {
    **_OF_TRANSFORMERS,
    **_OF_PICTURES,
    "graph convolution": of_graphs("GCNConv"),
    "graph attention": of_graphs("GATConv", heads=2, concat=False),
    "graph sage": of_graphs("SAGEConv"),
    "graph isomorphism": of_graphs("GINConv"),
    "graph transformer": of_graphs("TransformerConv"),
    "graph residual": of_graphs("GraphConv"),
    "recurrent cell": recurrent,
    "lstm": lstm,
    "transformer": translation,
}
