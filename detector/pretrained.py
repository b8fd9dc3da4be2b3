"""The weights that a new model starts with: ImageNet's, those of a backbone's file, or another detector's."""

from torchvision.models import get_model_weights

from detector import checkpoint, torchvision_checkpoint
from detector.backbone import Backbone
from detector.config import Config
from detector.errors import UserError
from detector.model import RetinaNet


def load_initial_weights(model: RetinaNet, cfg: Config) -> str:
    """Fill a new model as `model.weights` says; returns a line that describes it. Raises UserError if that fails.

    A detector's checkpoint fills every tensor of the same name and shape, but not the class outputs if the number of
    classes differs: 9 anchors of 3 classes have the shape of 3 anchors of 9.
    """
    weights = cfg.model.weights
    if weights == "none":
        return "random weights"
    try:
        content = {} if weights == "imagenet" else checkpoint.read_weights(weights)
    except UserError as error:
        raise UserError(f"model.weights: {error}") from None
    if "category_ids" not in content and not torchvision_checkpoint.is_torchvision(content):
        load_backbone_weights(model.backbone, cfg.model.backbone, weights)
        return f"backbone weights: {weights}"
    detector = checkpoint.read(weights)
    given, state = detector["model"], model.state_dict()
    other = "head.logits." if len(detector["category_ids"]) != model.head.num_classes else ()
    fitting = {
        key: value
        for key, value in given.items()
        if key in state and state[key].shape == value.shape and not key.startswith(other)
    }
    missing = [key for key in state if key not in fitting and "num_batches" not in key]
    of_backbone = [key for key in missing if key.startswith("backbone.")]
    if of_backbone or (cfg.model.norm == "gn" and any(key.endswith("running_mean") for key in given)):
        where = f" at {of_backbone[0]}" if of_backbone else ""
        raise UserError(
            f"model.weights: {weights} is of another backbone or norm{where}; set model.backbone and model.norm"
        )
    model.load_state_dict(fitting, strict=False)
    return f"weights: {len(fitting)} tensors from {weights}" + (f", random: {', '.join(missing)}" if missing else "")


def load_backbone_weights(backbone: Backbone, name: str, weights: str) -> None:
    """Fill the backbone from ImageNet ("imagenet") or from a file with torchvision's names.

    Raises UserError if the file is not there, is no state dict of this backbone, or cannot be downloaded.
    """
    if weights == "imagenet":
        try:
            state = get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"model.weights: imagenet weights of {name} cannot be downloaded ({error}); "
                "set model.weights to a local file with them, or to none, with model.norm=bn"
            ) from None
    else:
        state = checkpoint.read_weights(weights)
    missing = [key for key in backbone.state_dict() if key not in state and "num_batches" not in key]
    if missing:
        raise UserError(
            f"model.weights: {weights} is no {name}: it lacks {missing[0]} and {len(missing) - 1} more; "
            "give a state dict with torchvision's names"
        )
    try:
        backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise UserError(f"model.weights: {weights} is no {name}: {detail}") from None
