"""The weights that a new model starts with: ImageNet's, those of a backbone's file, or another detector's."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.models import get_model_weights

from detector import checkpoint, torchvision_checkpoint
from detector.backbone import Backbone
from detector.config import Config
from detector.errors import UserError
from detector.model import RetinaNet

CLASS_OUTPUTS = ("head.logits.weight", "head.logits.bias")


def load_initial_weights(model: RetinaNet, cfg: Config, class_names: Sequence[str]) -> str:
    """Fill a new model as `model.weights` says; returns a line that describes it. Raises UserError if that fails.

    A detector's checkpoint fills every tensor of the same name and shape, and the outputs of the classes that it
    shares with `class_names`, the model's.
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
    state = model.state_dict()
    outputs, by_name = _class_outputs(detector, state, class_names, model.anchors.per_position)
    given = {key: value for key, value in detector["model"].items() if key not in CLASS_OUTPUTS} | outputs
    fitting = {key: value for key, value in given.items() if key in state and state[key].shape == value.shape}
    missing = [key for key in state if key not in fitting and "num_batches" not in key]
    of_backbone = [key for key in missing if key.startswith("backbone.")]
    if of_backbone or (cfg.model.norm == "gn" and any(key.endswith("running_mean") for key in given)):
        where = f" at {of_backbone[0]}" if of_backbone else ""
        raise UserError(
            f"model.weights: {weights} is of another backbone or norm{where}; set model.backbone and model.norm"
        )
    model.load_state_dict(fitting, strict=False)
    random = f", random: {', '.join(missing)}" if missing else ""
    return f"weights: {len(fitting)} tensors from {weights}{by_name}{random}"


def _class_outputs(
    detector: checkpoint.Content, state: dict[str, Tensor], class_names: Sequence[str], anchors: int
) -> tuple[dict[str, Tensor], str]:
    """The class outputs of a new model, filled by class name, and a remark on how many names match.

    `state` is the new model's, which keeps its random outputs for other classes; `anchors` those of a position. A
    checkpoint without names, such as torchvision's, fills as many classes in their order. No outputs are returned if no
    class is shared, or if anchors or channels differ.
    """
    count, names = len(detector["category_ids"]), detector["class_names"]
    theirs = names or (class_names if len(class_names) == count else ())
    places = {name: place for place, name in enumerate(theirs)}
    shared = {place: places[name] for place, name in enumerate(class_names) if name in places}
    by_name = f", {len(shared)} of {len(class_names)} classes by name" if names else ""
    if not shared:
        return {}, by_name
    outputs = {}
    for key in CLASS_OUTPUTS:
        given, random = detector["model"].get(key), state[key]
        # The first side alone does not tell: 9 anchors of 3 classes have that of 3 anchors of 9.
        if given is None or given.shape != (anchors * count, *random.shape[1:]):
            return {}, ""
        of_class = random.clone().unflatten(0, (anchors, len(class_names)))  # as head.py orders them
        of_class[:, list(shared)] = given.unflatten(0, (anchors, count))[:, list(shared.values())].to(random)
        outputs[key] = of_class.flatten(0, 1)
    return outputs, by_name


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
