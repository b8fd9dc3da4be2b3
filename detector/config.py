"""The typed options and their defaults, which a YAML file overrides (config_files.py).

The options of a swappable part (`{name: ..., its options}`) are the arguments of its constructor. configure.py, which
knows the parts, checks them.
"""

import os
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from detector.errors import CONTROL, UserError
from detector.option_errors import describe

MAX_OPTION = 1e6  # for a part's options: a billion octaves or bins would fill the memory before the part checks them

Workers = Annotated[int, Field(ge=0, le=1024)] | Literal["auto"]
FilePath = Annotated[str, AfterValidator(os.path.expanduser)]  # no shell expands ~ in key=~/x, or in a file


class _Checked(BaseModel):
    """Checks of every option."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("give a number, not true or false")  # pydantic would read it as 1 or 0
        return value

    @field_validator("*")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        if isinstance(value, str) and CONTROL.search(value):
            raise ValueError("holds control characters")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError("exceeds 64 bits")
        return value


class Options(_Checked):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class Part(_Checked):
    """A swappable part: its name in the menu of configure.py, and its options."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _bounded(self) -> "Part":
        for key, value in self.options.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float, str)) and _size(number) > MAX_OPTION:
                    raise ValueError(f"{key} exceeds {MAX_OPTION:,.0f}")
        return self


class LossPart(Part):
    weight: float = Field(1.0, gt=0)  # multiplies the loss; losses' scales differ, so it is part of the choice


class Files(Options):
    annotations: FilePath = ""  # a COCO annotation file
    images: FilePath = ""  # the folder its file names start from; by default searched beside the annotation file


class Data(Options):
    train: Files = Files()
    val: Files = Files()
    short_side: int = Field(800, ge=32, le=2**14)  # pixels; smaller if the long side would exceed long_side
    long_side: int = Field(1333, ge=32, le=2**14)  # pixels, at most
    # padded sides are multiples of it; 128 makes fewer sizes, for CUDA graphs
    pad_to: int = Field(32, ge=32, le=1024, multiple_of=32)
    # loading processes; 0: load in the training process. auto on a GPU: its share of the cores minus one, at most 16.
    # auto on a CPU: 1, or 0 on a single core
    workers: Workers = "auto"
    horizontal_flip: float = Field(0.5, ge=0, le=1)  # probability
    vertical_flip: float = Field(0.0, ge=0, le=1)  # probability
    scale_jitter: tuple[float, float] = (1.0, 1.0)  # training images are resized by a factor drawn from this range
    # also mild shifts, zooms, rotations, crops and colour changes; boxes left less than 25% visible are dropped
    strong: bool = False
    cache: FilePath = ""  # a folder for the decoded and resized images; its disk must have room for all
    trust: bool = False  # accept boxes that look like another format, and training without any box

    @field_validator("workers", mode="wrap")
    @classmethod
    def _auto_or_number(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Workers:
        try:
            return check(value)
        except ValidationError:  # it lists an error for each of the two types
            raise ValueError("give auto, or a whole number from 0 to 1024") from None

    @model_validator(mode="after")
    def _ordered(self) -> "Data":
        low, high = self.scale_jitter
        if not 0.1 <= low <= high <= 10:
            raise ValueError(f"scale_jitter [{low}, {high}]: needs 0.1 <= low <= high <= 10")
        if self.long_side < self.short_side:
            raise ValueError(f"long_side {self.long_side} is below short_side {self.short_side}")
        return self


class HeadOptions(Options):
    depth: int = Field(4, ge=0, le=64)  # 3x3 convolutions of each tower
    width: int = Field(256, ge=32, le=2**14, multiple_of=32)  # their channels
    norm: Literal["none", "gn"] = "none"  # after each of them
    prior: float | None = Field(None, gt=0, lt=1)  # probability of each class at the start; null: as class_loss asks


class Model(Options):
    # resnet18, 34, 50, 101, 152, resnext50_32x4d, resnext101_32x8d, mobilenet_v2 or mobilenet_v3_large
    backbone: str = "resnet50"
    # imagenet | none | a file: of the backbone, or a checkpoint to fine-tune from, whose classes are matched by name
    weights: FilePath = "imagenet"
    norm: Literal["frozen_bn", "bn", "sync_bn", "gn"] = "frozen_bn"  # of the backbone
    frozen_stages: int | None = Field(None, ge=0, le=4)  # by default 1 (stem and first stage), from scratch 0
    p6_from: Literal["c5", "p5"] = "c5"  # the map that the coarser levels start from
    fpn_channels: int = Field(256, ge=32, le=2**14, multiple_of=32)  # of the pyramid's levels
    head: HeadOptions = HeadOptions()

    @model_validator(mode="after")
    def _trainable(self) -> "Model":
        if self.weights == "none" and self.norm == "frozen_bn":
            raise ValueError(
                "norm frozen_bn with weights none: frozen statistics of random weights never fit the data; "
                "use norm bn or gn, or give weights"
            )
        if self.weights == "none" and self.frozen_stages:
            raise ValueError(
                f"frozen_stages {self.frozen_stages} with weights none: frozen random filters never learn; "
                "use frozen_stages 0, or give weights"
            )
        if self.weights == "imagenet" and self.norm == "gn":
            raise ValueError(
                "norm gn with weights imagenet: those weights were trained with BatchNorm; "
                "use norm frozen_bn or bn, or weights none or a file trained with gn"
            )
        if self.frozen_stages is None:
            self.frozen_stages = 0 if self.weights == "none" else 1
        return self


class BoxCoding(Options):
    # of dx, dy, dw, dh
    weights: tuple[PositiveFloat, PositiveFloat, PositiveFloat, PositiveFloat] = (1.0, 1.0, 1.0, 1.0)


class Solver(Options):
    optimizer: Literal["sgd", "adamw"] = "sgd"  # adamw needs a far smaller lr, such as 1e-4
    lr: float = Field(0.01, gt=0)  # for batches of lr_batch_size; scaled in proportion, or by the root for adamw
    lr_batch_size: int | None = Field(16, ge=1)  # lr scales from here to batch_size; null: lr is as given
    batch_size: int = Field(16, ge=1, le=2**20)  # images a step, over all processes and accumulated parts
    # Parts in which a step is computed, one after the other, to save memory. The loss is that of the whole batch, so
    # each part is computed twice: once for its predictions, once for the gradient.
    accumulate: int = Field(1, ge=1)
    epochs: int = Field(12, ge=1)  # how often each image is seen
    max_steps: int | None = Field(None, ge=1)  # ends the training, and its schedule, earlier
    momentum: float = Field(0.9, ge=0, lt=1)  # of SGD
    weight_decay: float = Field(1e-4, ge=0)  # not of norms and biases
    # at lr_batch_size; smaller batches take proportionally more, at most half of all
    warmup_steps: int = Field(500, ge=0)
    warmup_factor: float = Field(0.001, gt=0, le=1)  # of the learning rate, at the first step
    schedule: Literal["step", "cosine"] = "step"  # of the learning rate
    decay_at: list[float] = [8 / 12, 11 / 12]  # shares of the training after which lr drops (step)
    decay_factor: float = Field(0.1, gt=0, lt=1)  # of the learning rate, each time
    clip_norm: float | None = Field(None, gt=0)  # largest norm of the gradient
    ema: float | None = Field(None, gt=0, lt=1)  # decay of the averaged weights; evaluation then uses them
    skip_nonfinite: int = Field(0, ge=0)  # steps of a run that may be skipped where loss or gradient is not finite

    @model_validator(mode="after")
    def _whole_parts(self) -> "Solver":
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} cannot be split in accumulate = {self.accumulate} parts")
        if any(not 0 < share < 1 for share in self.decay_at) or sorted(self.decay_at) != self.decay_at:
            raise ValueError(f"decay_at {self.decay_at}: needs growing shares of the training, between 0 and 1")
        return self


class PostprocessOptions(Options):
    score_threshold: float = Field(0.05, ge=0, lt=1)  # detections that do not exceed it are dropped
    top_k: int = Field(1000, ge=1)  # candidates kept on each pyramid level, before NMS
    nms_iou: float = Field(0.5, ge=0, le=1)  # of two boxes of a class that overlap more, the worse is dropped
    max_detections: int = Field(100, ge=1)  # boxes kept for an image


class Evaluation(Options):
    every: int = Field(1, ge=1)  # epochs; the last is always evaluated
    # images that each process evaluates at once; default: those of a training pass, at most 8
    batch_size: int | None = Field(None, ge=1)


class Saving(Options):
    every: int = Field(1000, ge=1)  # steps between checkpoints; one more at the end of each epoch


class TensorBoard(Options):
    enabled: bool = True  # write its files
    every: int = Field(20, ge=1)  # steps
    images: int = Field(8, ge=0)  # validation images drawn at each evaluation
    gradients: int = Field(200, ge=0)  # steps between two histograms of the gradient, and at the end; 0: none


class Config(Options):
    run: str = Field("run", min_length=1)  # results go to the folder output/run
    output: FilePath = "runs"  # the folder of all runs
    seed: int = Field(0, ge=0, lt=2**63)  # of the initial weights, the order of images and their augmentation
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    # Of the model; the criterion is always float32. auto: bfloat16 where that is faster
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    channels_last: bool = True  # the memory format of images and activations: the fastest for convolutions
    data: Data = Data()
    model: Model = Model()
    anchors: Part = Part(name="grid")
    assigner: Part = Part(name="iou")
    box_coder: BoxCoding = BoxCoding()
    class_loss: LossPart = LossPart(name="focal")
    box_loss: LossPart = LossPart(name="smooth_l1")
    solver: Solver = Solver()
    postprocess: PostprocessOptions = PostprocessOptions()
    evaluation: Evaluation = Evaluation()
    checkpoint: Saving = Saving()
    tensorboard: TensorBoard = TensorBoard()

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """Options without a name belong to the default part. A loss needs its name."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.pop("compile", False):  # in configs of older versions
            warnings.warn("compile: torch.compile no longer runs training steps; leave this option out", stacklevel=2)
        defaults = {key: field.default for key, field in cls.model_fields.items() if type(field.default) is Part}
        given = {key: part for key, part in defaults.items() if isinstance(values.get(key), dict)}
        return values | {key: {"name": part.name, **values[key]} for key, part in given.items()}

    @model_validator(mode="after")
    def _skippable(self) -> "Config":
        if self.solver.skip_nonfinite and self.model.norm in ("bn", "sync_bn"):
            raise ValueError(
                f"solver.skip_nonfinite with model.norm {self.model.norm}: a batch that is not finite spoils "
                "BatchNorm's statistics for good; use norm frozen_bn or gn, or skip_nonfinite 0"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.run


def build(values: dict[str, Any], source: str) -> Config:
    """Checked options from plain values; the UserError for a mistake names `source`."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: " + describe(error, Config)) from None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options under dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def dump(config: Config) -> str:
    """The options as YAML that `config_files.read` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _size(value: float | str) -> float:
    """The magnitude of a number, or of a text that is one; 0 for other texts."""
    try:
        return abs(float(value))
    except OverflowError:
        return float("inf")
    except ValueError:
        return 0.0
