"""The demo model as it trains: the project's own encoder modules, so that training exercises the cut for export too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metaembed.export.encoder import LanguageEncoder, VisionEncoder
from metaembed.runtime.geometry import Geometry
from metaembed.runtime.layout import LanguageInputs

from .demo_model import HIDDEN, build_config
from .scenes import Scene
from .train_inputs import lay_out_scenes, tensors

NO_IMAGES = torch.zeros(1, 1, HIDDEN)


class DemoModel(nn.Module):
    """Vision and language encoders; ``checkpoint`` names their weights as Hugging Face's Qwen2_5_VLModel does."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        geometry = Geometry.from_config(build_config())
        self.vision, self.language = VisionEncoder(geometry), LanguageEncoder(geometry)
        nn.init.normal_(self.language.language_model.embed_tokens.weight, std=0.05)
        nn.init.normal_(self.language.prompt_embed_tokens.weight, std=0.05)

    def see(self, scenes: Sequence[Scene]) -> Tensor:
        """Image embeddings [i, w * 16, d] of pages, in window order."""
        return self.vision(**tensors(lay_out_scenes(scenes)))

    def read(self, inputs: LanguageInputs, image_embeddings: Tensor | None = None) -> Tensor:
        """L2-normalised embeddings [b, r, d] at the inputs' answer rows."""
        images = NO_IMAGES if image_embeddings is None else image_embeddings
        return self.language(**tensors(inputs), image_embeddings=images)

    def checkpoint(self) -> dict[str, Tensor]:
        return {**self.vision.state_dict(), **self.language.state_dict()}

    def load_checkpoint(self, weights: dict[str, Tensor]) -> None:
        """Load strictly what ``checkpoint`` names (KeyError, RuntimeError, ValueError: names or shapes differ)."""
        for part in (self.vision, self.language):
            part.load_state_dict({name: weights[name] for name in part.state_dict()})
        unknown = weights.keys() - self.checkpoint().keys()
        if unknown:
            raise ValueError(f"the checkpoint holds unknown weights, {min(unknown)} for one")
