"""A model that is measured, and its failures in one line."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reattend.errors import Failure, ReattendError, Refusal, first_line
from reattend.families.rows import Family


class Subject(NamedTuple):
    """A model that is measured, what to call it, and its family."""

    name: str
    model: Any
    family: Family

    @property
    def predicts(self) -> bool:
        """Whether it predicts what follows, so that it has a perplexity."""
        return "encoder" not in self.family.features

    def run(self, tokens: Tensor) -> Any:
        """Return the model's output for one window (1, tokens)."""
        device = self.model.device
        try:
            with torch.inference_mode():
                return self.model(tokens if device.type == "meta" else tokens.to(device))
        except ReattendError as error:
            kind = Refusal if isinstance(error, Refusal) else Failure
            raise kind(f"{self.name}: {error}") from error
        except Exception as error:  # foreign code, and token ids that the model does not know
            raise Failure(f"{self.name}: can't be run: {type(error).__name__}: {first_line(error)}") from error

    def log_probs(self, tokens: Tensor) -> Tensor:
        """Return the log probabilities of what follows each token of one window (tokens - 1, vocabulary)."""
        logits = getattr(self.run(tokens), "logits", None)
        if logits is None:
            raise Failure(f"{self.name}: {type(self.model).__name__} gives no logits, and perplexity needs them")
        if not torch.isfinite(logits).all():
            raise Failure(f"{self.name}: its logits hold NaN or inf")
        return torch.log_softmax(logits[0, :-1].float(), -1).cpu()
