"""No pre-training: the encoder as it is initialised, "Random" of the paper's tables."""

from __future__ import annotations

from typing import ClassVar

from ..models import Encoder, UNetConfig
from .base import Corpus, Method, Outcome, Views


class Random(Method):
    """The start that pre-training has to beat. It takes no step."""

    label: ClassVar[str] = "Random"
    trains: ClassVar[bool] = False

    def __init__(self, model: UNetConfig, settings: None, corpus: Corpus | None) -> None:
        super().__init__()
        self.encoder = Encoder(model)

    def forward(self, views: Views) -> Outcome:
        raise RuntimeError("the random start is not trained; use another method to pre-train")
