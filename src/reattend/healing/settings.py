"""What a run of `heal` is told: flat keys, the same in a recipe and on the command line."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_Weight = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
_Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, strict=True)]
_CountOrNone = Annotated[int, Field(ge=0, strict=True)]


class Settings(BaseModel):
    """Losses by weight (0: not computed), what is trained and how. Selectors are shell patterns on tensor names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Literal["heal"] = "heal"
    teacher: str | None = Field(
        None,
        min_length=1,
        description="whom to follow, a folder or a Hub id; none: the model that the recipe was given",
    )
    kl: _Weight = Field(1.0, description="weight of KL(teacher || student), nats per token")
    temperature: _Positive = Field(
        1.0, description="divides both logits in kl, which is then multiplied by its square"
    )
    hidden: _Weight = Field(
        0.0, description="weight of the squared error of each layer's output, relative to the teacher's, per token"
    )
    labels: _Weight = Field(0.0, description="weight of the next-token loss on the text itself, nats per token")
    outliers: _Weight = Field(
        0.0, description="weight of (max|x| / outlier_limit - 1)^2, where positive, of attention and FFN outputs"
    )
    outlier_limit: _Positive = Field(10.0, description="magnitude up to which such an output costs nothing")
    norm_decay: _Weight = Field(0.0, description="decoupled weight decay of norm weights")
    weight_decay: _Weight = Field(0.0, description="decoupled weight decay of matrices")
    train: tuple[str, ...] = Field(("*",), min_length=1, description="tensors to train")
    new: tuple[str, ...] = Field((), description="tensors that surgery added")
    new_steps: _CountOrNone = Field(0, description="first steps, in which the new tensors alone are trained")
    steps: _Count = Field(1000, description="steps in all")
    batch: _Count = Field(8, description="windows per step, over all processes")
    micro_batch: _Count = Field(1, description="windows per forward pass of one process")
    windows: _Count | None = Field(None, description="windows drawn from the training text; none: all of it")
    learning_rate: _Positive = Field(
        3e-4, description="largest change per step relative to each row's size; falls to 0 as a cosine"
    )
    new_learning_rate: _Positive | None = Field(None, description="the same for the new tensors; none: as the others")
    warmup: _CountOrNone = Field(20, description="steps of linear warm-up, again when the other tensors join")
    clip_norm: _Positive | None = Field(1.0, description="largest norm of the gradient; none: as it is")
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16: products in bfloat16; trained weights are float32 in either"
    )
    recompute: bool = Field(False, strict=True, description="compute activations again in the backward pass")
    shard: bool = Field(False, strict=True, description="split weights and moments over the processes (FSDP)")
    keep: Literal["best", "last"] = Field(
        "best", description="which weights: of the evaluation with the least loss on the selection text, or the last"
    )
    evaluate_every: _Count = Field(100, description="steps between evaluations on the selection text")
    save_every: _Count = Field(100, description="steps that an interruption may cost")

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if not any((self.kl, self.hidden, self.labels, self.outliers)):
            raise ValueError("kl, hidden, labels and outliers are all 0: no loss is left")
        if (self.new_steps or self.new_learning_rate is not None) and not self.new:
            raise ValueError(
                "new_steps and new_learning_rate do nothing without new, which says what tensors are new"
            )
        if self.new_steps > self.steps:
            raise ValueError(f"new_steps: {self.new_steps} are more than the {self.steps} steps in all")
        if not self.distils and self.teacher is not None:
            raise ValueError("teacher does nothing without kl or hidden")
        return self

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return bool(self.kl or self.hidden)
